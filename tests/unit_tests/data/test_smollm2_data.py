# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The demo's own tokenizer and data, where they have been prepared."""

import json
from pathlib import Path

import pytest

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig, TokenizerConfig
from megatron.bridge.data.loaders import build_datasets
from megatron.bridge.data.tokenizer import build_tokenizer, check_tokenizer_fits

DATA = Path(__file__).parents[3] / "data"
MODEL = DATA / "smollm2-135m-instruct"
CHATTERBOT = DATA / "chatterbot"

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        not (MODEL / "tokenizer.json").exists(),
        reason=f"{MODEL} is not there: python scripts/finetune_smollm2/prepare_model.py makes it",
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(MODEL)))


def test_the_tokenizer_fits_the_model_and_takes_digits_one_by_one(tokenizer):
    check_tokenizer_fits(tokenizer, json.loads((MODEL / "config.json").read_text())["vocab_size"])
    assert len(tokenizer.text_to_ids("12345")) == 5
    assert tokenizer.eos_id == tokenizer.pad_id == 2


def test_text_survives_a_round_trip(tokenizer):
    text = "def f(x):\n    return x =  5  # é 😀 日本\n\n12"
    assert tokenizer.ids_to_text(tokenizer.text_to_ids(text)) == text


@pytest.mark.skipif(not CHATTERBOT.exists(), reason=f"{CHATTERBOT} is not there: prepare_data.py makes it")
def test_exactly_the_answers_are_learned(tokenizer):
    config = GPTSFTDatasetConfig(1024, dataset_root=str(CHATTERBOT), do_test=False)
    train, valid, _ = build_datasets(config, DatasetBuildContext(1, 1, 1, tokenizer))
    for dataset, name in ((train, "training"), (valid, "validation")):
        lines = (CHATTERBOT / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(dataset) == len(lines) and dataset.report.truncated == dataset.report.dropped == 0
        for sample, line in zip((dataset[index] for index in range(len(dataset))), lines, strict=True):
            messages = json.loads(line)["messages"]
            whole = tokenizer.hf_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert [int(sample["tokens"][0]), *sample["labels"].tolist()] == whole
            learned = sample["labels"][sample["loss_mask"] == 1].tolist()
            assert tokenizer.ids_to_text(learned) == messages[1]["content"] + "<|im_end|>"


@pytest.mark.skipif(not CHATTERBOT.exists(), reason=f"{CHATTERBOT} is not there: prepare_data.py makes it")
def test_no_validation_prompt_is_trained_on():
    prompts = {}
    for name in ("training", "validation"):
        lines = (CHATTERBOT / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["messages"][0]["content"] for line in lines]
        prompts[name] = {"".join(filter(str.isalnum, text.casefold())) or text for text in texts}
        assert len(prompts[name]) == len(texts)
    assert not prompts["training"] & prompts["validation"]
