# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run saves as `generation_config.json`: what it starts from, with what its tokenizer says is learned."""

import json
from types import SimpleNamespace

import pytest

from megatron.bridge.data.config import TokenizerConfig
from megatron.bridge.data.tokenizer import NullTokenizer, build_tokenizer
from megatron.bridge.training.run_state.end_tokens import generation_config_to_save
from megatron.bridge.training.run_state.load_plan import LoadPlan, Source
from tests.unit_tests.data.conftest import write_tokenizer

IM_END = 279


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))))


def write_model(directory, content):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def config_of(*, pretrained=None, hf_model_id=None):
    checkpoint = SimpleNamespace(pretrained_checkpoint=pretrained)
    return SimpleNamespace(checkpoint=checkpoint, model=SimpleNamespace(hf_model_id=hf_model_id))


def test_what_is_loaded_counts_first(tmp_path, tokenizer):
    loaded, pretrained, first = (
        write_model(tmp_path / name, {"eos_token_id": index}) for index, name in enumerate("abc")
    )
    cfg = config_of(pretrained=str(pretrained), hf_model_id=str(first))
    plan = LoadPlan(loaded, Source.HUGGING_FACE, optimizer=False, scheduler=False, rng=False, train_state=False)
    assert generation_config_to_save(cfg, tokenizer, plan) == {"eos_token_id": [0, IM_END]}
    assert generation_config_to_save(cfg, tokenizer, None) == {"eos_token_id": [1, IM_END]}
    pretrained.rename(tmp_path / "moved")
    assert generation_config_to_save(cfg, tokenizer, None) == {"eos_token_id": [2, IM_END]}
    assert generation_config_to_save(config_of(), tokenizer, None) == {"eos_token_id": [IM_END]}


def test_other_settings_are_kept(tmp_path, tokenizer):
    settings = {"eos_token_id": IM_END, "repetition_penalty": 1.1, "top_p": 0.8}
    cfg = config_of(pretrained=str(write_model(tmp_path / "model", settings)))
    assert generation_config_to_save(cfg, tokenizer, None) == settings


def test_damaged_settings_end_the_run_before_it_trains(tmp_path, tokenizer):
    cfg = config_of(pretrained=str(write_model(tmp_path / "model", "{")))
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        generation_config_to_save(cfg, tokenizer, None)


def test_numbers_have_no_text():
    assert generation_config_to_save(config_of(), NullTokenizer(8), None) is None
