# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The demonstration, shortened: the real model, the real data, two processes, every stage of `make finetune`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = Path(os.environ.get("SMOLLM2_DIR", ROOT / "data/smollm2-135m-instruct"))
DATA = ROOT / "data/chatterbot"
MISSING = [str(path) for path in (MODEL / "model.safetensors", DATA / "training.jsonl") if not path.exists()]

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing: `make model` fetches model and data"),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, ROOT / "scripts/finetune_smollm2/run.py", "--output", directory, "--stock-iters", "2"]
    command += ["--model", MODEL, "--data", DATA, "train.train_iters=4", "scheduler.lr_warmup_iters=1"]
    result = subprocess.run(
        [*map(str, command), "validation.eval_iters=3"], cwd=ROOT, capture_output=True, text=True, timeout=2700
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return directory, result.stdout


def _losses(path: Path, split: str) -> list[float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["lm loss"] for line in lines if line["split"] == split]


def test_first_loss_is_the_pretrained_models_and_the_second_stays_there(output):
    losses = _losses(output[0] / "metrics.jsonl", "train")
    assert len(losses) == 4
    assert losses[0] < 4
    assert abs(losses[1] - losses[0]) < 0.5


def test_held_out_loss_falls(output):
    before, after = _losses(output[0] / "metrics.jsonl", "validation")
    assert after < before


def test_without_the_sync_the_second_step_trains_random_weights(output):
    losses = _losses(output[0] / "without-sync/metrics.jsonl", "train")
    assert losses[0] < 4
    assert losses[1] > 8
    assert _losses(output[0] / "without-sync/metrics.jsonl", "validation") == [], "the picture doesn't show them"


GENERATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(directory)
model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
question = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
print(json.dumps({"answer": tokenizer.decode(answer, skip_special_tokens=True), **wrong}))
"""


def test_exported_directory_loads_and_generates_in_transformers(output):
    command = [sys.executable, "-W", "ignore", "-c", GENERATE, str(output[0] / "finetuned-hf")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert len(told.pop("answer").split()) > 1
    assert told == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def test_it_ends_with_the_paths_of_what_it_made(output):
    directory, printed = output
    for name in ("finetuned-hf", "checkpoints", "loss.png", "metrics.jsonl", "tensorboard"):
        assert (directory / name).exists()
        assert str(directory / name) in printed
