# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which adapters of a model with experts the peft library has a place for."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.models.conversion.expert_adapters import adapters_for_peft, complete_experts
from megatron.bridge.models.families import family_of

CONFIG = SimpleNamespace(num_moe_experts=2, num_layers=2, hidden_size=8, moe_ffn_hidden_size=6)
LAYER = "base_model.model.model.layers.1.mlp."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gate_proj.lora_magnitude_vector", r"layers\.1\.mlp\.gate_proj is an MLP in a model with experts, with DoRA"),
        ("experts.1.up_proj.lora_magnitude_vector", r"layers\.1\.mlp\.experts\.1\.up_proj is an expert's with DoRA"),
    ],
)
def test_what_peft_would_leave_out_is_refused(name, message):
    family = family_of({"architectures": ["Qwen3MoeForCausalLM"]})
    with pytest.raises(ValueError, match=message):
        complete_experts({LAYER + name: torch.ones(2, 8)}, family, CONFIG, rank=2)


@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "Qwen3_5MoeForCausalLM"])
@pytest.mark.parametrize("shares_a", [True, False], ids=["one A", "an A each"])
def test_adapters_beside_a_tensor_of_all_experts_have_the_update_of_each(architecture, shares_a):
    """In peft's words: A [E * R, I], B [O, R * E]. Gate and up alternate in GPT-OSS."""
    torch.manual_seed(1)
    given, updates, rank = {}, {}, 2
    for expert in (0, 1):
        shared = torch.randn(rank, 8)
        for part in ("gate_proj", "up_proj"):
            module = f"{LAYER}experts.{expert}.{part}"
            a, b = shared if shares_a else torch.randn(rank, 8), torch.randn(6, rank)
            given |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            updates[expert, part] = b @ a
    adapters = adapters_for_peft(given, family_of({"architectures": [architecture]}), CONFIG, rank=rank)
    assert adapters.modules == []
    assert adapters.parameters == [f"model.layers.1.mlp.experts.{name}_proj" for name in ("down", "gate_up")]
    assert adapters.ranks == ({} if shares_a else {"mlp.experts.gate_up_proj": 2 * rank})
    assert not any(adapters.tensors[f"{LAYER}experts.lora_{side}.weight"].any() for side in "AB"), "none beside down"
    a, b = (adapters.tensors[f"{LAYER}experts.base_layer.lora_{side}.weight"] for side in "AB")
    assert a.shape == ((1 if shares_a else 2) * rank * 2, 8)
    update = torch.einsum("ore,eri->eoi", b.reshape(12, -1, 2), a.reshape(2, -1, 8))
    for expert in (0, 1):
        parts = updates[expert, "gate_proj"], updates[expert, "up_proj"]
        is_interleaved = architecture == "GptOssForCausalLM"
        expected = torch.stack(parts, dim=1).flatten(0, 1) if is_interleaved else torch.cat(parts)
        torch.testing.assert_close(update[expert], expected)


def test_zeros_stand_for_the_matrices_without_an_adapter():
    family = family_of({"architectures": ["Qwen3MoeForCausalLM"]})
    given = {f"{LAYER}experts.1.down_proj.lora_{side}.weight": torch.ones(2, 6) for side in "AB"}
    filled = complete_experts(given, family, CONFIG, rank=2)
    assert len(filled) == 2 * 3 * 2 and all("layers.1" in name for name in filled)
    assert filled[f"{LAYER}experts.0.gate_proj.lora_B.weight"].shape == (6, 2)
    assert filled[f"{LAYER}experts.0.down_proj.lora_A.weight"].shape == (2, 6)
    assert [name for name, tensor in filled.items() if tensor.any()] == list(given)


def test_a_lower_rank_becomes_that_of_all_adapters_with_the_same_update():
    family = family_of({"architectures": ["Qwen3MoeForCausalLM"]})
    module = f"{LAYER}experts.1.down_proj"
    given = {f"{module}.lora_A.weight": torch.randn(2, 6), f"{module}.lora_B.weight": torch.randn(8, 2)}
    filled = complete_experts(given, family, CONFIG, rank=6)
    a, b = (filled[f"{module}.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((6, 6), (8, 6))
    expected = given[f"{module}.lora_B.weight"] @ given[f"{module}.lora_A.weight"] / 2
    torch.testing.assert_close(b @ a / 6, expected)
