# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""scripts/training/run_recipe.py trains: all weights under torchrun, adapters and from random weights on ranks."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rigs.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "training" / "run_recipe.py")
SHORT = [
    "train.train_iters=2",
    "train.global_batch_size=4",
    "scheduler.lr_warmup_iters=1",
    "logger.tensorboard_dir=null",
]


def run_recipe(*arguments):
    return runpy.run_path(SCRIPT)["main"](list(map(str, arguments)))


def run_recipe_in(directory, *arguments):
    before = os.getcwd()
    os.chdir(directory)
    try:
        return run_recipe(*arguments)
    finally:
        os.chdir(before)


def arguments_of(inputs, recipe, output):
    places = [f"dataset.dataset_root={inputs / 'my-data'}"] if "_sft_" in recipe else []
    places += [f"checkpoint.{name}={output}" for name in ("save", "load")]
    return ["--recipe", recipe, "--hf-path", str(inputs / "my-model"), "--seq-length", "32", *places, *SHORT]


def test_a_full_finetune_under_torchrun(inputs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    command += arguments_of(inputs, "smollm2_135m_sft_config", tmp_path / "out")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert "offloaded to the CPU: 100%" in done.stderr


@pytest.mark.parametrize("recipe", ["llama31_8b_peft_config", "qwen3_600m_pretrain_config"])
def test_adapters_and_random_weights(inputs, tmp_path, recipe):
    arguments = [*arguments_of(inputs, recipe, tmp_path / "out"), "validation.eval_iters=1"]
    scheme = ["--peft_scheme", "dora", "--dataset", "squad"] if "peft" in recipe else []
    (tmp_path / "squad").mkdir()  # a local copy of the dataset with that short name
    for split, size in (("train", 8), ("validation", 2)):
        rows = [{"context": "a", "question": f"b{i}", "answers": {"text": ["c"]}} for i in range(size)]
        (tmp_path / "squad" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_on_ranks(run_recipe_in, 2, tmp_path, *arguments, *scheme) == [0, 0]
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "2"
    written = (tmp_path / "out" / "iter_0000002" / "run_config.yaml").read_text()
    assert ("DoRA" in written) == ("hf_dataset: squad" in written) == bool(scheme)


def test_an_error_is_one_line_on_all_ranks(inputs, tmp_path, capsys):
    arguments = arguments_of(inputs, "llama31_8b_sft_config", tmp_path / "out")
    assert run_recipe(*arguments, "train.train_iter=3") == 1
    assert capsys.readouterr().err.startswith(
        "run_recipe: unknown option train.train_iter: did you mean train.train_it"
    )
