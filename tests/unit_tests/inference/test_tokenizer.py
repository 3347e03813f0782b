# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer adapter, as Core's engines call it, and where its tokenizer is found."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.inference.options import add_model_loading_args
from megatron.bridge.inference.tokenizer import HFTokenizerAdapter, build_tokenizer
from tests.unit_tests.data.conftest import tokenizer, tokenizer_directory, write_tokenizer  # noqa: F401  # fixtures

TEXT = "the cat sat. Ünï 😀"


@pytest.fixture
def adapter(tokenizer):  # noqa: F811
    return HFTokenizerAdapter(tokenizer.hf_tokenizer)


def test_texts_become_tokens_and_back(adapter):
    ids = adapter.tokenize(TEXT)
    assert ids == adapter.tokenizer(TEXT)["input_ids"]
    assert adapter.detokenize(ids) == adapter.detokenize(torch.tensor(ids)) == TEXT
    assert adapter.detokenize([*ids, adapter.eod]) == TEXT + "<|im_end|>"
    assert adapter.detokenize([*ids, adapter.eod], skip_special_tokens=True) == TEXT


def test_special_tokens_have_cores_names(adapter, tokenizer):  # noqa: F811
    assert adapter.bos == adapter.bos_id == tokenizer.bos_id
    assert adapter.eod == adapter.eos_id == adapter.pad == tokenizer.eos_id
    assert adapter.end_ids == (tokenizer.eos_id,)
    assert adapter.vocab_size == len(adapter) == len(tokenizer.hf_tokenizer)
    assert HFTokenizerAdapter(tokenizer.hf_tokenizer, [7, 8]).end_ids == (7, 8)


def test_a_token_has_its_place_in_the_text(adapter):
    ids = adapter.tokenize(TEXT)
    offsets = adapter.offsets(ids, TEXT)
    expected = adapter.tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    words = [TEXT[start:end] for start, end in zip(offsets, [*offsets[1:], len(TEXT)], strict=True)]
    assert offsets == [start for start, _ in expected] and "".join(words) == TEXT


def test_bos_is_put_where_the_tokenizer_puts_it(tmp_path, adapter):
    assert not adapter.puts_bos
    putting = build_tokenizer(write_tokenizer_of_a_model(tmp_path, adds_bos=True))
    assert putting.puts_bos and putting.tokenize("cat") == [putting.bos, *adapter.tokenize("cat")]
    assert putting.tokenize("cat", add_special_tokens=False) == adapter.tokenize("cat")


def test_conversations_are_rendered_by_the_template(tmp_path, adapter):
    turns = [{"role": "system", "content": "sat"}, {"role": "user", "content": "cat"}]
    text = adapter.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nsat<|im_end|>\n<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"
    without = build_tokenizer(write_tokenizer_of_a_model(tmp_path, chat_template=None))
    with pytest.raises(ValueError, match="has no chat template"):
        without.apply_chat_template(turns)


def write_tokenizer_of_a_model(directory, **options):
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return write_tokenizer(directory, **options)


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_model_loading_args(parser)
    return parser.parse_args(list(map(str, words)))


def test_a_text_ends_where_the_model_says(tmp_path, caplog):
    write_tokenizer_of_a_model(tmp_path)
    settings = {"eos_token_id": [3, 5], "repetition_penalty": 1.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    for source in (tmp_path, str(tmp_path), arguments("--hf-model-path", tmp_path)):
        assert build_tokenizer(source).end_ids == (3, 5)
    assert build_tokenizer(arguments(), tmp_path).end_ids == (3, 5)
    assert build_tokenizer(SimpleNamespace(hf_model_path=tmp_path), trust_remote_code=True).end_ids == (3, 5)
    with pytest.raises(ValueError, match="option revison='x' is unknown"):
        build_tokenizer(tmp_path, revison="x")
    assert "generation_config.json says repetition_penalty=1.3" in caplog.text


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: pass --hf-model-path"):
        build_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no model is named"):
        build_tokenizer(arguments())


def test_a_tokenizer_without_end_is_named(tmp_path):
    write_tokenizer_of_a_model(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if not name.startswith(("eos", "pad"))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = build_tokenizer(tmp_path)
    assert found.end_ids == ()
    with pytest.raises(ValueError, match="has no EOS token"):
        _ = found.eod
