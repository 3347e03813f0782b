# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Wrong files and wrong options: each ends on both ranks, before a step, with one line that says what and where."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron.bridge.checkpoint.__main__ import main as inspect_checkpoint
from megatron.bridge.data.config import GPTSFTDatasetConfig, TokenizerConfig
from megatron.bridge.training.callbacks import Callback
from tests.rigs.on_ranks import make_pretrained, run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import SEQ_LENGTH, tiny_config
from tests.unit_tests.data.conftest import write_tokenizer

OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
ITERATION = "saved/iter_0000001"


class StepCounter(Callback):
    def __init__(self):
        self.started = 0

    def on_train_step_start(self, context):
        self.started += 1


def _config(directory, sections, *, jsonl=None, tokenizer=None):
    """A run that works, but for what `sections`, the data and the tokenizer say."""
    checkpoint = {"save": None, "pretrained_checkpoint": f"{directory}/pretrained"}
    checkpoint |= {
        name: f"{directory}/{value}" if name in ("save", "load", "pretrained_checkpoint") and value else value
        for name, value in sections.get("checkpoint", {}).items()
    }
    sections = {**sections, "optimizer": OFFLOAD, "checkpoint": checkpoint}
    cfg = tiny_config(directory, train_iters=2, **sections)
    if jsonl is not None:
        cfg.dataset = GPTSFTDatasetConfig(
            seq_length=SEQ_LENGTH, dataset_root=f"{directory}/{jsonl}", do_validation=False, do_test=False
        )
    if tokenizer is not None:
        cfg.tokenizer = TokenizerConfig(tokenizer_model=f"{directory}/{tokenizer}")
    return cfg


def _refusal(cfg):
    """(error, steps begun) of a finetune that must not begin."""
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    counter = StepCounter()
    try:
        finetune(cfg, forward_step, callbacks=[counter])
    except Exception as error:
        return f"{type(error).__name__}: {error}", counter.started
    return "no error", counter.started


def _refused_run(directory, sections, options):
    return _refusal(_config(directory, sections, **options))


def _refused_on_rank_1(directory, good, bad):
    """Rank 1 finds something else than rank 0 does: another disk, another version of a file."""
    sections, options = (good, bad)[dist.get_rank()]
    return _refusal(_config(directory, sections, **options))


def _make_checkpoints(directory):
    make_pretrained(f"{directory}/pretrained")
    cfg = tiny_config(
        directory,
        train_iters=1,
        optimizer=OFFLOAD,
        checkpoint={"pretrained_checkpoint": f"{directory}/pretrained", "save": f"{directory}/saved"},
    )
    run_finetune(cfg)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad_input")
    run_on_ranks(_make_checkpoints, 2, path)
    write_tokenizer(path / "tokenizer")
    row = json.dumps({"input": "the cat", "output": "sat on the mat"})
    for name, lines in {
        "good": [row] * 16,
        "broken": [row] * 11 + ['{"input": "the cat", "output": '] + [row] * 4,
        "no_answer": [row] * 4 + [json.dumps({"input": "the cat"})] + [row] * 11,
        "few": [row] * 5,
        "nothing": [],
    }.items():
        (path / name).mkdir()
        (path / name / "training.jsonl").write_text("\n".join(lines) + "\n")
    (path / "no_training").mkdir()
    (path / "file").touch()
    return path


def check_refused(answers, *texts):
    """Both ranks ended, before a step, in one line that says all of `texts`."""
    assert len(answers) == 2
    for error, steps in answers:
        for text in texts:
            assert text in error, error
        assert "\n" not in error
        assert steps == 0


def refused(directory, sections=None, **options):
    return run_on_ranks(_refused_run, 2, directory, sections or {}, options)


def test_the_run_that_the_others_spoil_works(directory):
    wide = {"model": {"vocab_size": 128}, "checkpoint": {"load": "saved"}}
    for error, steps in refused(directory, wide):
        assert (error, steps) == ("no error", 1)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def remove_one(pattern):
    def remove(iteration):
        sorted(iteration.glob(pattern))[-1].unlink()

    return remove


BROKEN_CHECKPOINTS = {
    "metadata.json": (remove_one("metadata.json"), ["is not a complete checkpoint: metadata.json is missing"]),
    "metadata.json cut off": (lambda it: cut(it / "metadata.json", 9), ["metadata.json is damaged: expected JSON"]),
    "one distcp": (remove_one("__1_*.distcp"), ["__1_", ".distcp is missing: expected ", " bytes, as "]),
    "a distcp cut off": (
        lambda it: cut(sorted(it.glob("__0_*.distcp"))[0], 100),
        ["__0_", ".distcp has 100 bytes: expected "],
    ),
    ".metadata cut off": (lambda it: cut(it / ".metadata", 100), [".metadata is damaged (", "expected torch's"]),
    "train_state.pt": (
        remove_one("train_state.pt"),
        ["train_state.pt is missing: there is no step to resume from", "checkpoint.finetune=true"],
    ),
    "train_state.pt cut off": (lambda it: cut(it / "train_state.pt", 100), ["train_state.pt can't be read as plain"]),
    "run_config.yaml": (remove_one("run_config.yaml"), ["run_config.yaml is missing: expected the configuration"]),
    "the iteration": (shutil.rmtree, ["iter_0000001", "is not a complete checkpoint: there is no such directory"]),
    "common.pt": (remove_one("common.pt"), ["has no common.pt"]),
    "common.pt cut off": (lambda it: cut(it / "common.pt", 100), ["common.pt can't be read as plain data"]),
}
HAS_COMMON_FILE = "common_strategy" in inspect.signature(dist_checkpointing.load).parameters


@pytest.mark.parametrize("broken", BROKEN_CHECKPOINTS)
def test_a_half_written_checkpoint(directory, tmp_path, broken):
    if broken.startswith("common.pt") and not HAS_COMMON_FILE:
        pytest.skip("this Megatron-Core has no common.pt: the common state is in the .distcp files")
    shutil.copytree(directory / "saved", tmp_path / "saved")
    shutil.copytree(directory / "pretrained", tmp_path / "pretrained")
    spoil, texts = BROKEN_CHECKPOINTS[broken]
    (tmp_path / ITERATION / "manifest.json").unlink()  # as in a checkpoint that another program wrote
    spoil(tmp_path / ITERATION)
    check_refused(refused(tmp_path, {"checkpoint": {"load": "saved"}}), str(tmp_path / "saved"), *texts)


def flip_a_bit(pattern):
    def flip(iteration):
        path = sorted(iteration.glob(pattern))[-1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)

    return flip


DAMAGED_CHECKPOINTS = {
    "tensors": (flip_a_bit("__1_*.distcp"), ["__1_", ".distcp is damaged: its crc32 is ", ", expected "]),
    "configuration": (flip_a_bit("run_config.yaml"), ["run_config.yaml is damaged: its crc32 is "]),
    "a file that isn't needed at once": (flip_a_bit("train_state.pt"), ["train_state.pt is damaged: its crc32 is "]),
    "a file that is gone": (remove_one("train_state.pt"), ["train_state.pt is missing: expected "]),
    "manifest": (lambda it: cut(it / "manifest.json", 100), ["manifest.json is damaged ("]),
}


@pytest.mark.parametrize("damaged", DAMAGED_CHECKPOINTS)
def test_a_damaged_checkpoint(directory, tmp_path, damaged):
    shutil.copytree(directory / "saved", tmp_path / "saved")
    shutil.copytree(directory / "pretrained", tmp_path / "pretrained")
    spoil, texts = DAMAGED_CHECKPOINTS[damaged]
    spoil(tmp_path / ITERATION)
    way_out = "load another iteration (checkpoint.ckpt_step); if the files were changed on purpose, remove manifest"
    check_refused(refused(tmp_path, {"checkpoint": {"load": "saved"}}), str(tmp_path / "saved"), *texts, way_out)


def test_damaged_tensors_load_where_no_one_wants_to_know(directory, tmp_path):
    shutil.copytree(directory / "saved", tmp_path / "saved")
    shutil.copytree(directory / "pretrained", tmp_path / "pretrained")
    iteration = tmp_path / ITERATION
    listed = json.loads((iteration / "manifest.json").read_text())
    name = next(name for name in listed["files"] if name.endswith(".distcp"))
    listed["files"][name][1] = "00000000"
    (iteration / "manifest.json").write_text(json.dumps(listed))
    unverified = {"checkpoint": {"load": "saved", "verify_integrity": False}}
    assert {error for error, _ in refused(tmp_path, unverified)} == {"no error"}
    check_refused(refused(tmp_path, {"checkpoint": {"load": "saved"}}), f"{name} is damaged")


def test_inspect_and_verify(directory, tmp_path, capsys):
    shutil.copytree(directory / "saved", tmp_path / "saved")
    assert inspect_checkpoint(["verify", str(tmp_path / "saved")]) == 0
    assert " files are what their crc32 says" in capsys.readouterr().out

    assert inspect_checkpoint(["inspect", str(tmp_path / "saved")]) == 0
    seen = capsys.readouterr().out
    for text in ("with checksums", "optimizer state dp_reshardable", "step 1, 8 samples consumed", "hidden_size "):
        assert text in seen
    assert re.search(r"weights: \d+ tensors, \d+\.\d MB bfloat16\n  optimizer state: \d+ tensors, .* MB float32", seen)

    for name in ("__0_0.distcp", "run_config.yaml"):
        flip_a_bit(name)(tmp_path / ITERATION)
    assert inspect_checkpoint(["verify", str(tmp_path / "saved")]) == 1
    seen = capsys.readouterr().out.splitlines()
    assert [line.partition(" is damaged")[0].rpartition("/")[2] for line in seen[:-1]] == [
        "__0_0.distcp",
        "run_config.yaml",
    ]

    assert inspect_checkpoint(["inspect", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("inspect: path=")


WRONG_OPTIONS = {
    "no checkpoint": (
        {"checkpoint": {"pretrained_checkpoint": "nowhere"}},
        {},
        ["checkpoint.pretrained_checkpoint", "/nowhere"],
    ),
    "another width": (
        {"model": {"hidden_size": 32, "kv_channels": 8}},
        {},
        ["pretrained/iter_0000000 doesn't fit this model: ", "has shape (", "the run needs (", "more); load a"],
    ),
    "more layers": (
        {"model": {"num_layers": 4}},
        {},
        ["pretrained/iter_0000000 doesn't fit this model", "(2, ", "(4, "],
    ),
    "another vocabulary, padded alike": (
        {"model": {"vocab_size": 120}, "tokenizer": {"vocab_size": 120}},
        {},
        ["pretrained/iter_0000000 was saved by a model with vocab_size=128, this model has 120: set model.vocab_size"],
    ),
    "another vocabulary": ({"model": {"vocab_size": 256}}, {}, ["vocab_size=128, this model has 256"]),
    "invalid JSON": (
        {"model": {"vocab_size": 384}},
        {"jsonl": "broken", "tokenizer": "tokenizer"},
        ["broken/training.jsonl:12: ", "not valid JSON"],
    ),
    "a field missing": (
        {"model": {"vocab_size": 384}},
        {"jsonl": "no_answer", "tokenizer": "tokenizer"},
        ["no_answer/training.jsonl:5: ", "output"],
    ),
    "no data file": (
        {"model": {"vocab_size": 384}},
        {"jsonl": "no_training", "tokenizer": "tokenizer"},
        ["no_training/training.jsonl does not exist"],
    ),
    "no samples": (
        {"model": {"vocab_size": 384}},
        {"jsonl": "nothing", "tokenizer": "tokenizer"},
        ["nothing/training.jsonl"],
    ),
    "too few samples": (
        {"model": {"vocab_size": 384}},
        {"jsonl": "few", "tokenizer": "tokenizer"},
        ["the training data has 5 samples", "train.global_batch_size=8", "lower train.global_batch_size"],
    ),
    "a tokenizer with more ids": (
        {},
        {"jsonl": "good", "tokenizer": "tokenizer"},
        ["tokenizer ", " has ids up to ", "the model's vocabulary has 128 entries", "tokenizer.tokenizer_model"],
    ),
    "no tokenizer": (
        {},
        {"jsonl": "good", "tokenizer": "nowhere"},
        ["tokenizer.tokenizer_model=", "nowhere' is no directory: expected a Hugging Face model's"],
    ),
    "saving below a file": (
        {"checkpoint": {"save": "file/checkpoints"}},
        {},
        ["checkpoint.save=", "file/checkpoints' can't be written (", "name a directory"],
    ),
    "logging below a file": (
        {"logger": {"tensorboard_dir": "/dev/null/tensorboard"}},
        {},
        ["logger.tensorboard_dir='/dev/null/tensorboard' can't be written"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG_OPTIONS)
def test_wrong_option(directory, wrong):
    sections, options, texts = WRONG_OPTIONS[wrong]
    check_refused(refused(directory, sections, **options), *texts)


VOCABULARY = {"model": {"vocab_size": 384}}
WRONG_ON_RANK_1 = {
    "reading {directory}/good/training.jsonl": (
        (VOCABULARY, {"jsonl": "good", "tokenizer": "tokenizer"}),
        (VOCABULARY, {"jsonl": "broken", "tokenizer": "tokenizer"}),
    ),
    "loading the tokenizer": (
        (VOCABULARY, {"jsonl": "good", "tokenizer": "tokenizer"}),
        (VOCABULARY, {"jsonl": "good", "tokenizer": "nowhere"}),
    ),
    "planning the load": (
        ({"checkpoint": {"load": "saved"}}, {}),
        ({"checkpoint": {"load": "file_of_rank_1"}}, {}),
    ),
}


@pytest.mark.parametrize("doing", WRONG_ON_RANK_1)
def test_an_error_on_rank_1_ends_rank_0(directory, doing):
    good, bad = WRONG_ON_RANK_1[doing]
    if doing == "planning the load":
        shutil.copytree(directory / "saved", directory / "file_of_rank_1")
        (directory / "file_of_rank_1" / "iter_0000001" / "metadata.json").unlink()
    answers = run_on_ranks(_refused_on_rank_1, 2, directory, good, bad)
    check_refused(answers)
    (on_0, *_), (on_1, *_) = answers
    assert on_0 == f"RuntimeError: {doing.format(directory=directory)} failed on rank 1: {on_1}"


A_RUN_THAT_FAILS_ON_RANK_1 = """
import sys

import torch.distributed as dist

from megatron.bridge.training import gpt_step
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.state import GlobalState
from tests.rigs.tiny import tiny_config


def forward_step(state: GlobalState, data_iterator, model):
    if dist.get_rank() == 1 and state.train_state.step == 1:
        raise ArithmeticError("only here, in step 2")
    return gpt_step.forward_step(state, data_iterator, model)


directory = sys.argv[1]
cfg = tiny_config(
    directory, train_iters=1000, checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/pretrained"}
)
cfg.optimizer.optimizer_cpu_offload, cfg.optimizer.optimizer_offload_fraction = True, 1.0
finetune(cfg, forward_step)
"""


@pytest.mark.any_core
def test_an_error_on_rank_1_in_the_middle_of_a_run_ends_torchrun(directory, tmp_path):
    """Rank 0 waits for rank 1 in a collective; the launcher ends it."""
    script = tmp_path / "run.py"
    script.write_text(A_RUN_THAT_FAILS_ON_RANK_1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    done = subprocess.run(
        [*command, str(directory)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode != 0
    assert "ArithmeticError: only here, in step 2" in done.stderr
    assert "step 1/1000" in done.stderr, "it had begun to train"
    assert "step 3/1000" not in done.stderr
