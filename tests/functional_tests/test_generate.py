# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a Megatron checkpoint says is what transformers says, on every layout; `python -m megatron.bridge.generate`."""

import contextlib
import io
import json
import shutil
import unittest
import unittest.mock

import pytest
import torch

from megatron.bridge.generate import main
from megatron.bridge.models.generation import Sampling
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.data.conftest import write_tokenizer
from tests.unit_tests.models.tiny_llama import LLAMA3_ROPE, save_tiny_llama

PROMPT = [5, 17, 40, 3, 88]
NEW_TOKENS = 24
VOCAB_SIZE = 336
"""More than the tokenizer's; two tensor-parallel ranks have padding beside it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a tiny Llama with a tokenizer, and the Hugging Face directory that it came from."""
    directory = tmp_path_factory.mktemp("generate")
    save_tiny_llama(directory / "hf", vocab_size=VOCAB_SIZE, rope_scaling=LLAMA3_ROPE, num_hidden_layers=2)
    write_tokenizer(directory / "hf")
    run_on_ranks(_import, 1, directory)
    return directory


def _import(directory):
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    AutoBridge.import_ckpt(directory / "hf", directory / "megatron", show_progress=False)


def _generated(directory, *, tp=1, pp=1, hf_model=None, **options):
    from megatron.bridge.models.generation import generate_tokens, load_for_generation
    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(tp, pp):
        model = load_for_generation(directory / "megatron", hf_model=hf_model)
        end_ids, number = options.get("end_ids", ()), options.get("max_new_tokens", NEW_TOKENS)
        sampling = Sampling(**options.get("sampling", {}))
        return list(generate_tokens(model, PROMPT, max_new_tokens=number, sampling=sampling, end_ids=end_ids))


def _transformers(directory):
    """The greedy continuation by transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    from megatron.bridge.utils.simulated_accelerator import suspended

    with suspended():
        model = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32).eval()
        ids = torch.tensor([PROMPT])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    return output[0, len(PROMPT) :].tolist()


DRAWN = {"sampling": {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "seed": 3}}


def _one_rank(directory):
    greedy = _generated(directory)
    end = greedy[4]
    return {
        "transformers": _transformers(directory),
        "greedy": greedy,
        "from the hf configuration": _generated(directory, hf_model=directory / "hf"),
        "stopped": (greedy[: greedy.index(end) + 1], _generated(directory, end_ids={end})),
        "drawn": [_generated(directory, **DRAWN) for _ in range(2)],
        "other seed": _generated(directory, sampling={**DRAWN["sampling"], "seed": 4}),
        "one candidate": _generated(directory, sampling={"temperature": 5.0, "top_k": 1}),
    }


@pytest.fixture(scope="module")
def one_rank(checkpoint):
    return run_on_ranks(_one_rank, 1, checkpoint)[0]


def test_greedy_tokens_are_those_of_transformers(one_rank):
    assert len(set(one_rank["transformers"])) > 5, "a text of one word would show little"
    assert one_rank["greedy"] == one_rank["transformers"]
    assert one_rank["from the hf configuration"] == one_rank["greedy"]
    assert one_rank["stopped"][0] == one_rank["stopped"][1]


def test_draws_follow_from_the_seed(one_rank):
    first, second = one_rank["drawn"]
    assert first == second != one_rank["greedy"]
    assert one_rank["other seed"] != first
    assert one_rank["one candidate"] == one_rank["greedy"]


def _two_ranks(directory):
    return [
        (_generated(directory, **sizes), _generated(directory, **sizes, **DRAWN)) for sizes in ({"tp": 2}, {"pp": 2})
    ]


def test_two_ranks_say_what_one_says(checkpoint, one_rank):
    for results in run_on_ranks(_two_ranks, 2, checkpoint):
        for greedy, drawn in results:
            assert greedy == one_rank["greedy"] and drawn == one_rank["drawn"][0]


def _of_a_broken_model(directory):
    from megatron.bridge.models.generation import generate_tokens, load_for_generation
    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(1, 2):
        model = load_for_generation(directory / "megatron")
        for parameter in model[0].parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        try:
            list(generate_tokens(model, PROMPT, max_new_tokens=2))
        except FloatingPointError as error:
            return str(error)


def test_logits_that_are_no_numbers_end_all_stages(checkpoint):
    said = run_on_ranks(_of_a_broken_model, 2, checkpoint, timeout_seconds=120)
    assert len(set(said)) == 1 and "logits are NaN" in said[0]


def test_draws_keep_to_their_candidates():
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        return {Sampling(temperature=1.0, **options).choose(logits, generator) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 2}
    assert drawn(top_p=0.5) == {0} and drawn(top_p=0.51) == {0, 2} and drawn(top_p=1e-9) == {0}
    assert Sampling(temperature=1e-3).choose(logits, generator) == 0
    with pytest.raises(FloatingPointError, match="NaN"):
        Sampling().choose(logits * float("nan"), generator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1: expected 0"),
        ({"temperature": 1, "top_k": -2}, "top_k=-2: expected 0"),
        ({"temperature": 1, "top_p": 0}, "top_p=0: expected more than 0"),
        ({"top_k": 5}, "set a temperature above 0"),
    ],
)
def test_samplings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def _on_rank(*args):
    """The command inside a rank that has paid for the imports: (status, output, last line of errors)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["--max-new-tokens", "6", *map(str, args)])
    return status, out.getvalue(), err.getvalue().strip()


def _commands(directory):
    ckpt = ("--megatron-path", directory / "megatron", "--prompt", "the cat")
    bare = directory / "bare"
    shutil.copytree(directory / "megatron", bare)
    shutil.rmtree(bare / "iter_0000000" / "tokenizer")
    return {
        "plain": _on_rank(*ckpt),
        "chat": _on_rank(*ckpt, "--chat", "--system", "sat"),
        "bos": _on_rank(*ckpt, "--add-bos"),
        "fp32": _on_rank(*ckpt, "--dtype", "float32"),
        "bf16": _on_rank(*ckpt, "--dtype", "bfloat16", "--hf-model", directory / "hf"),
        "drawn": _on_rank(*ckpt, "--temperature", 2, "--top-k", 9, "--seed", 3),
        "tokenizer from elsewhere": _on_rank("--megatron-path", bare, *ckpt[2:], "--hf-model", directory / "hf"),
        "no tokenizer": _on_rank("--megatron-path", bare, *ckpt[2:]),
        "no checkpoint": _on_rank("--megatron-path", directory / "nothing", *ckpt[2:]),
        "no prompt": _on_rank(*ckpt[:2], "--prompt", ""),
        "no chat": _on_rank(*ckpt, "--system", "x"),
        "twice": _on_rank(*ckpt, "--chat", "--add-bos"),
        "no tokens": _on_rank(*ckpt, "--max-new-tokens", 0),
        "no temperature": _on_rank(*ckpt, "--top-k", 3),
    }


def test_the_command_streams_text_and_names_what_is_wrong(checkpoint):
    done = run_on_ranks(_commands, 1, checkpoint)[0]
    for name in ("plain", "chat", "bos", "drawn"):
        status, output, _ = done[name]
        assert status == 0 and output.strip() and output.endswith("\n"), name
    assert len({done[name][1] for name in ("plain", "chat", "bos", "drawn")}) == 4, "each option says something else"
    assert done["tokenizer from elsewhere"][:2] == done["fp32"][:2] == done["plain"][:2]
    assert done["bf16"][0] == 0 and done["bf16"][1].strip(), done["bf16"][2]
    expected = {
        "no tokenizer": "holds no tokenizer: pass --hf-model",
        "no checkpoint": "nothing",
        "no prompt": "the prompt has token none",
        "no chat": "--system is part of a conversation: add --chat",
        "twice": "--add-bos with --chat",
        "no tokens": "--max-new-tokens 0: expected 1 or more",
        "no temperature": "set a temperature above 0",
    }
    for name, message in expected.items():
        status, output, errors = done[name]
        assert (status, output) == (1, ""), name
        assert errors.splitlines()[-1].startswith("generate: ") and message in errors.splitlines()[-1], name


def _begins_and_ends(directory):
    """A model whose tokenizer puts BOS and that names two end tokens: what both sides say, in text."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    shutil.copytree(directory / "hf", directory / "other" / "hf")
    directory = directory / "other"
    write_tokenizer(directory / "hf", adds_bos=True)
    free = _continued(directory / "hf", "the cat")
    settings = {"eos_token_id": [279, free[3]], "repetition_penalty": 1.0}
    (directory / "hf" / "generation_config.json").write_text(json.dumps(settings))
    _import(directory)
    ckpt = ("--megatron-path", directory / "megatron", "--prompt", "the cat", "--dtype", "float32")
    AutoBridge.from_hf_pretrained(directory / "hf").export_ckpt(directory / "megatron", directory / "exported", False)
    stored = directory / "megatron" / "iter_0000000" / "tokenizer" / "generation_config.json"
    found = {
        "free": free,
        "transformers": [_continued(directory / name, "the cat") for name in ("hf", "exported")],
        "chat": (_continued(directory / "exported", "the cat", chat=True), _tokens_of(*ckpt, "--chat")),
        "ours": [_tokens_of(*ckpt), _tokens_of(*ckpt, "--add-bos")],
        "exported": json.loads((directory / "exported" / "generation_config.json").read_text()),
    }
    stored.write_text(json.dumps({**settings, "repetition_penalty": 1.3}))
    (directory / "megatron" / "iter_0000000" / "manifest.json").unlink()
    with unittest.TestCase().assertLogs("megatron.bridge.generate", "WARNING") as heard:
        _tokens_of(*ckpt)
    return {**found, "settings": settings, "heard": heard.output}


def _continued(directory, prompt, *, chat=False):
    """What transformers' `generate` adds to a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron.bridge.utils.simulated_accelerator import suspended

    tokenizer, turns = AutoTokenizer.from_pretrained(directory), [{"role": "user", "content": prompt}]
    as_chat = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    with suspended():
        ids = (tokenizer.apply_chat_template(turns, **as_chat) if chat else tokenizer(prompt, return_tensors="pt"))[
            "input_ids"
        ]
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def _tokens_of(*args):
    """The tokens that the command makes."""
    from megatron.bridge.models import generation

    made, whole = [], generation.generate_tokens
    with unittest.mock.patch.object(
        generation, "generate_tokens", lambda *a, **k: (made.append(one) or one for one in whole(*a, **k))
    ):
        status, _, errors = _on_rank(*args)
    assert status == 0, errors
    return made


def test_a_text_begins_and_ends_as_in_transformers(checkpoint):
    """Its BOS, its end tokens, after an export too; what of its settings isn't applied is said."""
    found = run_on_ranks(_begins_and_ends, 1, checkpoint)[0]
    assert found["free"][3] not in found["free"][:3], "another token has to be made the end"
    assert found["transformers"] == found["ours"] == [found["free"][:4]] * 2
    assert found["chat"][0] == found["chat"][1]
    assert found["exported"] == found["settings"]
    assert "generation_config.json says repetition_penalty=1.3" in found["heard"][0]


def _on_two(directory):
    arguments = ("--megatron-path", directory / "megatron", "--prompt", "the cat")
    return _on_rank(*arguments), _on_rank(*arguments, "--pp", 2), _on_rank(*arguments, "--tp", 2)


def test_rank_0_writes_the_text(checkpoint):
    first, second = run_on_ranks(_on_two, 2, checkpoint)
    assert len({output for _, output, _ in first}) == 1 and first[0][1].strip()
    assert {(status, output) for status, output, _ in second} == {(0, "")}
