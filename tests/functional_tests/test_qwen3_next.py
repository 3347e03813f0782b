# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Qwen3-Next from a Hugging Face directory through training, offload and a checkpoint to an export that says the same.

Gated DeltaNet layers carry a state along the sequence: samples of a packed row must not see it, and generation must.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.models.packed_attention import attention_arguments
from megatron.bridge.utils.simulated_accelerator import suspended
from tests.functional_tests.test_conversion_finetune import loss_of
from tests.rigs.families import MODELS
from tests.rigs.on_ranks import differing, finetune_from_hf
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import VOCAB_SIZE
from tests.unit_tests.models.tiny_llama import save_tiny_model

PROMPTS, NEW_TOKENS = [[5, 17, 40, 3, 88, 9], [7, 61, 2]], 8


def _train_and_export(directory):
    plain = finetune_from_hf(directory, offload=False, save=False, recompute=False)
    offloaded = finetune_from_hf(directory, offload=True, save=True)
    drift = differing(offloaded.weights_after, plain.weights_after)
    before, after = plain.weights_before, plain.weights_after
    still = {name for name in after if torch.equal(before[name], after[name])}
    shared = {name: weight for name, weight in after.items() if "norm" in name or "router" in name or "gate_w" in name}
    bridge = AutoBridge.from_hf_pretrained(directory / "hf")
    bridge.export_ckpt(directory / "megatron", directory / "exported", False, dtype="float32")
    return plain.losses, offloaded.losses, drift, still, shared


@torch.no_grad()
def _said(directory):
    """What is generated for two prompts together, and a packed row's logits beside those of its samples alone."""
    from megatron.bridge.models.generation import generate_together, load_for_generation
    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(1, 1):
        model = load_for_generation(directory / "megatron", dtype="float32")
        steps = list(generate_together(model, PROMPTS, max_new_tokens=[NEW_TOKENS] * 2))
        generated = [[step[row] for step in steps if step[row] is not None] for row in range(2)]
        row = torch.tensor([sum(PROMPTS, [])])
        bounds = torch.tensor([[0, *(len(PROMPTS[0]), row.shape[1])]], dtype=torch.int32)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in PROMPTS])[None]
        packed = model[0](row, positions, **attention_arguments(model[0], bounds, seq_length=row.shape[1]))
        alone = [model[0](torch.tensor([one]), torch.arange(len(one))[None], None) for one in PROMPTS]
        return generated, float((packed - torch.cat(alone, 1)).abs().max())


def _transformers(directory):
    with suspended():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW_TOKENS}
        return [model.generate(torch.tensor([one]), **options)[0, len(one) :].tolist() for one in PROMPTS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3_next")
    model = MODELS["qwen3_next"]
    options = {**model.options, "vocab_size": VOCAB_SIZE, "initializer_range": 0.02}
    save_tiny_model(directory / "hf", model.architecture, dtype=torch.bfloat16, **options)
    return directory, run_on_ranks(_train_and_export, 2, directory)


def test_offload_and_recomputation_change_no_bit_and_ranks_keep_what_they_share(trained):
    directory, runs = trained
    assert runs[0][3] == set(), "rank 1 has the embedding's padding, which isn't trained"
    for losses, offloaded, drift, _, shared in runs:
        assert offloaded == losses and drift == {}
        assert abs(losses[0] - loss_of(directory / "hf")) < 0.1 and losses[-1] < losses[0]
        assert any("self_attention.norm_weight" in name for name in shared)
        assert any("shared_experts.gate_weight" in name for name in shared)
        assert differing(shared, runs[0][-1]) == {}


def test_checkpoint_and_export_say_the_same_and_packed_samples_what_they_say_alone(trained):
    directory, _ = trained
    expected = _transformers(directory / "exported")
    assert len(set(sum(expected, []))) > 3, "a text of one word would show little"
    for generated, leak in run_on_ranks(_said, 1, directory):
        assert generated == expected and leak < 1e-5
