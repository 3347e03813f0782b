# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`megatron.bridge.inference.text_generation` and `scripts/inference`: batches say what transformers says, anywhere."""

import argparse
import contextlib
import io
import json
import runpy
import unittest.mock
import warnings
from pathlib import Path

import pytest
import torch

from tests.rigs.ranks import end_ranks, run_on_ranks
from tests.unit_tests.data.conftest import write_tokenizer
from tests.unit_tests.models.tiny_llama import LLAMA3_ROPE, save_tiny_llama

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "inference" / "generate_text.py")
PROMPTS = ["the cat", "a dog ran to the mat and sat", "on"]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Llama whose tokenizer puts BOS, and its Megatron checkpoint."""
    directory = tmp_path_factory.mktemp("text_generation")
    save_tiny_llama(directory / "hf", vocab_size=336, rope_scaling=LLAMA3_ROPE, num_hidden_layers=2)
    write_tokenizer(directory / "hf", adds_bos=True)
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return directory


def _script(directory, *words):
    """The script on a rank: its status, what it wrote, the last line of errors, the rows of its file."""
    file = directory / "out" / f"{torch.distributed.get_rank()}.jsonl"
    file.unlink(missing_ok=True)
    out, err = io.StringIO(), io.StringIO()
    words = [str(word).replace("FILE", str(file)) for word in words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = runpy.run_path(SCRIPT)["main"]([*words, "--max-new-tokens", str(NEW_TOKENS)])
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else None
    return status, out.getvalue(), err.getvalue().strip().split("\n")[-1], rows


def _tokens(done):
    status, _, errors, rows = done
    assert status == 0, errors
    return None if rows is None else [row["generated_tokens"] for row in rows]


def _transformers(directory, prompt):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron.bridge.utils.simulated_accelerator import suspended

    with suspended():
        ids = AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt")["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def _one_rank(directory):
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    free = _transformers(directory / "hf", PROMPTS[0])
    (directory / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [279, free[3]]}))
    AutoBridge.import_ckpt(directory / "hf", directory / "megatron", show_progress=False)
    file = ("--prompt-file", directory / "prompts.jsonl", "--output-file", "FILE")
    hf, megatron = ("--hf-model-path", directory / "hf"), ("--megatron_model_path", directory / "megatron")
    drawn = ("--temperature", "1.5", "--seed", "3")
    return {
        "free": free,
        "transformers": [_transformers(directory / "hf", prompt) for prompt in PROMPTS],
        "hf": _script(directory, *hf, *file),
        "megatron": _script(directory, *megatron, *file),
        "one by one": _script(directory, *megatron, *file, "--max-requests", "1"),
        "drawn": [_script(directory, *hf, *file, *drawn, "--max-requests", size) for size in (1, 8)],
        "bf16": _script(directory, *hf, *file, "--dtype", "bfloat16", "--trust-remote-code"),
        "endless": _script(directory, *hf, *file, "--ignore-eos"),
        "terminal": _script(directory, *hf, "--prompts", *PROMPTS),
        "chat": _script(directory, *hf, "--prompts", "the cat", "--chat", "--system", "sat", "--output-file", "FILE"),
        "too long": _script(directory, *hf, *file, "--max-sequence-length", "12"),
        "too large": _script(directory, *hf, *file, "--buffer-size-gb", "1e-6"),
        "no model": _script(directory, *file),
        "no prompts": _script(directory, *hf),
        "adapters of nothing": _script(directory, *hf, *file, "--base", "x"),
    }


@pytest.fixture(scope="module")
def one_rank(directory):
    return run_on_ranks(_one_rank, 1, directory)[0]


def test_a_batch_says_what_transformers_says(one_rank):
    expected = one_rank["transformers"]
    assert expected[0] == one_rank["free"][:4] and max(map(len, expected)) == NEW_TOKENS, "one ends, one doesn't"
    for name in ("hf", "megatron", "one by one"):
        assert _tokens(one_rank[name]) == expected, name
    assert list(map(len, _tokens(one_rank["bf16"]))) and _tokens(one_rank["bf16"])[0]
    endless = _tokens(one_rank["endless"])
    assert endless[0] == one_rank["free"] and set(map(len, endless)) == {NEW_TOKENS}


def test_draws_do_not_depend_on_the_batch(one_rank):
    first, second = map(_tokens, one_rank["drawn"])
    assert first == second != _tokens(one_rank["hf"])


def test_what_is_written(one_rank):
    rows = one_rank["hf"][3]
    assert [row["prompt"] for row in rows] == PROMPTS
    printed = "".join(f"prompt: {row['prompt']}\ntext:   {row['generated_text']}\n\n" for row in rows)
    assert one_rank["terminal"][:2] == (0, printed) and one_rank["hf"][1] == ""
    assert _tokens(one_rank["chat"])[0] != _tokens(one_rank["hf"])[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too long", "prompt 1 has 9 tokens, and 8 new ones make 17: the limit is max_sequence_length=12"),
        ("too large", "more than buffer_size_gb=1e-06: raise it, or lower max_requests"),
        ("no model", "no model is named: pass --hf-model-path or --megatron-model-path"),
        ("no prompts", "there are no prompts"),
        ("adapters of nothing", "--base is of adapters in a Megatron checkpoint"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(one_rank, name, message):
    status, output, errors, rows = one_rank[name]
    assert (status, output, rows) == (1, "", None)
    assert errors.startswith("generate_text: ") and message in errors


def _two_ranks(directory):
    file = ("--prompt-file", directory / "prompts.jsonl", "--output-file", "FILE")
    hf, megatron = ("--hf-model-path", directory / "hf"), ("--megatron-model-path", directory / "megatron")
    tp, pp = ("--tp", "2"), ("--pipeline-model-parallel-size", "2", "--temperature", "1.5", "--seed", "3")
    return [_script(directory, *hf, *file, *tp), _script(directory, *megatron, *file, *pp)]


def test_two_ranks_say_what_one_says(directory, one_rank):
    first, second = run_on_ranks(_two_ranks, 2, directory)
    assert list(map(_tokens, first)) == [_tokens(one_rank["hf"]), _tokens(one_rank["drawn"][0])]
    assert list(map(_tokens, second)) == [None, None], "rank 0 writes"


def _in_python(directory):
    """The engine here, and Core's static engine with the same model and tokenizer."""
    from megatron.bridge.inference.engine import TextGenerationEngine
    from megatron.bridge.inference.text_generation import (
        add_model_loading_args,
        add_sampling_args,
        build_sampling_params,
        build_tokenizer,
        groups_of,
        load_bridge_model,
        resolve_hf_model_path,
    )

    parser = argparse.ArgumentParser()
    add_model_loading_args(parser)
    add_sampling_args(parser)
    args = parser.parse_args(["--megatron-path", str(directory / "megatron"), "--max-new-tokens", "4", "--seed", "7"])
    with groups_of(args):
        model, tokenizer = load_bridge_model(args), build_tokenizer(args)
        engine = TextGenerationEngine(model=model, tokenizer=tokenizer)
        params = build_sampling_params(args, tokenizer)
        results = engine.generate(PROMPTS, params)
        longer = build_sampling_params(args, num_tokens_to_generate=NEW_TOKENS)
        text = engine.generate(PROMPTS[2], longer)[0].generated_text
        word = next(letter for letter in text if letter.isalpha() and letter.isascii())
        stopping = build_sampling_params(args, num_tokens_to_generate=NEW_TOKENS, stop_words=[word])
        stopped = engine.generate(PROMPTS[2], stopping)[0]
        found = {
            "is evaluated": not model.training,
            "seed": model.config.inference_sampling_seed,
            "hf": Path(resolve_hf_model_path(args)) == directory / "hf",
            "ours": [(one.prompt, one.generated_tokens.tolist(), one.generated_text) for one in results],
            "of tokens": engine.generate(results[0].prompt_tokens, params)[0].generated_tokens.tolist(),
            "total": engine.generate("on", build_sampling_params(args, num_tokens_total=5))[0].generated_length,
            "on": len(tokenizer.tokenize("on")),
            "stopped": (stopped.generated_text, text[: text.index(word)]),
            "length": stopped.generated_length,
            "none": engine.generate([], params),
            "core": _of_core(model, tokenizer, params),
        }
        for wrong in ({"return_log_probs": True}, {"top_n_logprobs": 2}):
            with pytest.raises(
                ValueError, match=f"sampling_params.{next(iter(wrong))}=.* is not built into this engine"
            ):
                engine.generate(PROMPTS, build_sampling_params(args, **wrong))
    return found


def _of_core(model, tokenizer, params):
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.inference_request import InferenceRequest
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    try:
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

        settings = [InferenceWrapperConfig(model.config.hidden_size, torch.float32, 1000, 336)]
    except ImportError:
        settings = []
    host = torch.Generator(device="cpu")  # a device's own generator is not simulated; greedy tokens don't draw
    with warnings.catch_warnings(), unittest.mock.patch.object(torch, "Generator", lambda device: host):
        warnings.simplefilter("ignore")
        wrapped = GPTInferenceWrapper(model, *settings, inference_context=StaticInferenceContext(4, 64))
        engine = StaticInferenceEngine(TextGenerationController(wrapped, tokenizer), max_batch_size=4, legacy=True)
        requests = [
            InferenceRequest(
                request_id=index, prompt=one, prompt_tokens=tokenizer.tokenize(one), sampling_params=params
            )
            for index, one in enumerate(PROMPTS)
        ]
        made = engine.generate(inference_requests=requests)
    return [one.generated_tokens.tolist() for one in made]


def test_it_works_from_python_and_with_cores_engine(directory, one_rank):
    found = run_on_ranks(_in_python, 1, directory)[0]
    end_ranks(1)  # Core 0.19's engine leaves the whole process in inference mode
    assert found["is evaluated"] and found["hf"] and found["seed"] == 7
    assert [(prompt, tokens) for prompt, tokens, _ in found["ours"]] == [
        (prompt, tokens[:4]) for prompt, tokens in zip(PROMPTS, one_rank["transformers"], strict=True)
    ]
    assert found["of tokens"] == found["ours"][0][1]
    assert found["total"] == 5 - found["on"] and found["none"] == []
    assert found["stopped"][0] == found["stopped"][1] and 0 < found["length"] < NEW_TOKENS
    assert found["core"] == [tokens for _, tokens, _ in found["ours"]]
