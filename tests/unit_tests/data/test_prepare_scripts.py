# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The demo's scripts that prepare, on small wheels made here, and what both refuse first: nothing is downloaded."""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts" / "finetune_smollm2"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return {name: importlib.import_module(name) for name in ("prepare_data", "prepare_model", "wheel_files")}


CORPUS = """
conversations:
- - What is AI?
  - The  study of thinking machines.
- - what is ai
  - A second answer to the same prompt.
- - Only a question
- - 1 + 1?
  - 2
"""


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def make_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("chatterbot_corpus/data/english/ai.yml", CORPUS)
        archive.writestr("chatterbot_corpus/data/french/ai.yml", "conversations: [[a, b]]")
    return path


def read_rows(folder: Path) -> list[dict]:
    names = ("training.jsonl", "validation.jsonl")
    return [json.loads(line) for name in names for line in (folder / name).read_text().splitlines()]


def test_data_is_made_once_and_a_prompt_appears_once(tmp_path):
    wheel, output = make_wheel(tmp_path / "corpus.whl"), tmp_path / "data"
    first = run_script("prepare_data", "--wheel", str(wheel), "--output", str(output))
    assert first.returncode == 0, first.stderr
    pairs = [[message["content"] for message in row["messages"]] for row in read_rows(output)]
    assert sorted(pairs) == [["1 + 1?", "2"], ["What is AI?", "The study of thinking machines."]]
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    wheel.unlink()
    second = run_script("prepare_data", "--wheel", str(wheel), "--output", str(output))
    assert second.stdout == f"{output} is ready\n"
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "nothing is left beside the output"


def test_a_damaged_output_is_not_taken_for_ready(tmp_path):
    output = tmp_path / "data"
    run_script("prepare_data", "--wheel", str(make_wheel(tmp_path / "corpus.whl")), "--output", str(output))
    (output / "training.jsonl").write_text("")
    again = run_script("prepare_data", "--output", str(output))
    assert again.returncode == 1
    assert again.stderr.startswith("prepare_data: ") and "has 0 bytes, expected" in again.stderr


@pytest.mark.parametrize("name", ["prepare_data", "prepare_model"])
def test_errors_are_one_line_and_leave_nothing(tmp_path, name):
    (tmp_path / "wrong.whl").write_text("no zip file")
    wrong = run_script(name, "--wheel", str(tmp_path / "wrong.whl"), "--output", str(tmp_path / "out"))
    assert wrong.returncode == 1
    assert wrong.stderr.count("\n") == 1 and "wrong.whl is not the wheel of" in wrong.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    taken = run_script(name, "--output", str(tmp_path / "mine"))
    assert taken.returncode == 1 and "exists but has no prepared.json" in taken.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "wrong.whl"]


def test_the_split_is_a_function_of_the_prompt(scripts):
    data = scripts["prepare_data"]
    assert data.normalized_prompt("  What's  AI?? ") == data.normalized_prompt("what s ai") == "what s ai"
    assert data.normalized_prompt("?!") == "?!"
    splits = [data.split_of(f"prompt {number}") for number in range(2000)]
    assert splits == [data.split_of(f"prompt {number}") for number in range(2000)]
    assert 130 < splits.count("validation") < 270


def test_query_rows_return_from_pairs_to_halves(scripts):
    # One head of dimension 4 on a hidden size of 1: Hugging Face's rows a0 a1 b0 b1 are stored as a0 b0 a1 b1.
    stored = np.array([[10], [20], [11], [21], [30], [40], [31], [41]])
    restored = scripts["prepare_model"].undo_rotary_interleaving(stored, num_heads=2)
    assert restored[:, 0].tolist() == [10, 11, 20, 21, 30, 31, 40, 41]


def test_tensor_names(scripts):
    name = scripts["prepare_model"].hugging_face_name
    assert name("token_embd.weight") == "model.embed_tokens.weight"
    assert name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert name("blk.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    with pytest.raises(scripts["wheel_files"].PreparationError, match="'blk.0.ssm_a.weight'"):
        name("blk.0.ssm_a.weight")


def test_a_wheel_with_another_digest_is_refused(scripts, tmp_path, monkeypatch):
    wheels = scripts["wheel_files"]

    def download(command, **_):
        (Path(command[command.index("--dest") + 1]) / "a-1.whl").write_bytes(b"tampered")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    with pytest.raises(wheels.PreparationError, match=r"a-1\.whl has sha256 \w+, expected 00"):
        wheels.download_wheel("a==1", sha256="00", directory=tmp_path)


@pytest.mark.parametrize(
    ("script", "wrong"), [("run", "train.train_itrs=3"), ("run", "train.train_iters=many"), ("run_lora", "peft.dimm=8")]
)
def test_a_wrong_override_is_refused_before_earlier_results_go(tmp_path, monkeypatch, script, wrong):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"of an earlier run")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--output", str(tmp_path), wrong])
    with pytest.raises(SystemExit, match=rf"^error: .*{wrong.partition('=')[0]}"):
        importlib.import_module(script).main()
    assert picture.exists()
