# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""From a command line to the engine's settings and to Core's sampling parameters."""

import argparse
import importlib.util
from types import SimpleNamespace

import pytest

from megatron.bridge.inference.options import add_engine_args, add_sampling_args
from megatron.bridge.inference.settings import InferenceLimits, build_inference_config, build_sampling_params


def parsed(add, *words):
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(words)


def config(*words, **overrides):
    return build_inference_config(parsed(add_engine_args, *words), **overrides)


def params(*words, **options):
    return build_sampling_params(parsed(add_sampling_args, *words), **options)


def test_the_limits_are_in_the_settings():
    found = config("--max-sequence-length", "64", "--max-requests", "3")
    assert (found.max_sequence_length, found.max_requests, found.buffer_size_gb) == (64, 3, 20)
    assert config(max_sequence_length=32).max_sequence_length == 32
    if importlib.util.find_spec("megatron.core.inference.config") is None:
        assert isinstance(found, InferenceLimits)
    else:
        from megatron.core.inference.config import InferenceConfig

        assert isinstance(found, InferenceConfig)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-sequence-length", "0"), "--max-sequence-length 0: expected more than 0"),
        (("--max-requests", "-1"), "--max-requests -1: expected more"),
        (("--num-cuda-graphs", "2"), "--num-cuda-graphs is of Core's dynamic engine on a GPU, and this"),
        (("--enable-prefix-caching",), "--enable-prefix-caching is of Core's dynamic"),
    ],
)
def test_settings_that_cannot_work_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        build_inference_config(argparse.Namespace(device="cpu", **vars(parsed(add_engine_args, *words))))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (1.0, 1, 0.0)),
        ("--temperature 0", (1.0, 1, 0.0)),
        ("--temperature 0.7", (0.7, 0, 0.0)),
        ("--temperature 1", (1.0, 0, 0.0)),
        ("--top-p 0.9", (1.0, 0, 0.9)),
        ("--top-k 0", (1.0, 0, 0.0)),
        ("--top-k 5 --temperature 0.5", (0.5, 5, 0.0)),
    ],
)
def test_the_likeliest_token_unless_draws_are_asked_for(words, expected):
    found = params(*words.split())
    assert (found.temperature, found.top_k, found.top_p) == expected
    assert isinstance(found.temperature, float) and isinstance(found.top_p, float), "as Core asserts"


def test_the_other_parameters():
    found = params("--num-tokens-to-generate", "7", "--stop-words", "x", "--ignore-eos", return_log_probs=True)
    assert (found.num_tokens_to_generate, found.stop_words, found.termination_id) == (7, ["x"], -1)
    assert found.return_log_probs and not found.add_BOS
    plain = params()
    assert (plain.num_tokens_to_generate, plain.stop_words, plain.termination_id) == (30, None, None)
    assert params("--add-bos").add_BOS and params(tokenizer=SimpleNamespace(puts_bos=True)).add_BOS
    assert not params(tokenizer=SimpleNamespace(puts_bos=False)).add_BOS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--temperature -1", "--temperature -1.0: expected 0"),
        ("--temperature nan", "--temperature nan: expected 0"),
        ("--temperature 0 --top-k 3", "leave --top-k and --top-p out"),
        ("--top-k -2", "--top-k -2: expected 0"),
        ("--top-p 1.5", "--top-p 1.5: expected 0"),
        ("--max-new-tokens 0", "--num-tokens-to-generate 0: expected 1"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        params(*words.split())
