# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The groups of options: which values they give, under which spellings."""

import argparse

import pytest

from megatron.bridge.inference import options


def parsed(add, *words):
    parser = argparse.ArgumentParser()
    add(parser)
    return vars(parser.parse_args(words))


def test_the_model(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    nothing = dict.fromkeys(("hf_model_path", "megatron_model_path", "base", "dtype"))
    assert parsed(options.add_model_loading_args) == {**nothing, "trust_remote_code": False}
    words = "--hf_model_path ~/x --megatron-path ~/y --base ~/z --torch_dtype bfloat16 --trust_remote_code".split()
    assert parsed(options.add_model_loading_args, *words) == {
        "hf_model_path": "/home/me/x",
        "megatron_model_path": "/home/me/y",
        "base": "/home/me/z",
        "dtype": "bfloat16",
        "trust_remote_code": True,
    }
    with pytest.raises(SystemExit):
        parsed(options.add_model_loading_args, "--dtype", "int8")


def test_the_layout():
    assert parsed(options.add_parallelism_args) == {"tp": 1, "pp": 1, "ep": 1, "etp": None}
    words = "--tp 2 --pipeline-model-parallel-size 3 --expert_model_parallel_size 4 --etp 1".split()
    assert parsed(options.add_parallelism_args, *words) == {"tp": 2, "pp": 3, "ep": 4, "etp": 1}


def test_the_processes():
    values = {"device": "auto", "distributed_backend": "auto", "distributed_timeout_minutes": 10.0}
    assert parsed(options.add_distributed_args) == values
    words = "--device cpu --distributed-backend gloo --distributed_timeout_minutes 2.5".split()
    given = {"device": "cpu", "distributed_backend": "gloo", "distributed_timeout_minutes": 2.5}
    assert parsed(options.add_distributed_args, *words) == given


def test_the_engine():
    neutral = {"block_size_tokens": None, "max_tokens": None, "num_cuda_graphs": None}
    neutral |= {"enable_chunked_prefill": False, "enable_prefix_caching": False}
    values = {"max_sequence_length": 2560, "max_requests": 8, "buffer_size_gb": 20.0, **neutral}
    assert parsed(options.add_engine_args) == values
    words = "--inference_max_seq_length 64 --max-batch-size 3 --buffer-size-gb 0.5 --num-cuda-graphs 2".split()
    given = {"max_sequence_length": 64, "max_requests": 3, "buffer_size_gb": 0.5, "num_cuda_graphs": 2}
    assert parsed(options.add_engine_args, *words) == {**values, **given}


def test_the_prompts():
    nothing = dict.fromkeys(("prompts", "prompt_file", "prompt_file_num_truncate", "system"))
    assert parsed(options.add_prompt_args) == {**nothing, "chat": False}
    given = parsed(options.add_prompt_args, "--prompts", "a b", "c", "--prompt", "d", "--prompt_file_num_truncate", "2")
    assert (given["prompts"], given["prompt_file_num_truncate"]) == (["a b", "c", "d"], 2)


def test_the_choice_of_tokens():
    given = parsed(options.add_sampling_args)
    assert (given["temperature"], given["top_k"], given["top_p"], given["num_tokens_to_generate"]) == (
        1.0,
        None,
        0.0,
        30,
    )
    given = parsed(options.add_sampling_args, *"--max_new_tokens 5 --top_k 4 --top-p 0.5 --stop-words a b".split())
    assert (given["num_tokens_to_generate"], given["top_k"], given["top_p"]) == (5, 4, 0.5)
    assert given["stop_words"] == ["a", "b"] and not given["add_bos"] and not given["ignore_eos"]


def test_all_groups_fit_into_one_command_line():
    parser = argparse.ArgumentParser()
    for name in ("model_loading", "parallelism", "distributed", "engine", "prompt", "sampling"):
        group = getattr(options, f"add_{name}_args")(parser)
        group.add_argument(f"--of-my-own-{name}")
    assert "--of-my-own-sampling" in parser.format_help()
