# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which adapters of a model with experts the peft library has a place for."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.models.conversion.expert_adapters import complete_experts
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


def test_an_adapter_of_one_expert_has_no_place_beside_a_tensor_of_all():
    family = family_of({"architectures": ["GptOssForCausalLM"]})
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj is an expert's, .* one tensor for all experts"):
        complete_experts({f"{LAYER}experts.1.up_proj.lora_A.weight": torch.ones(2, 8)}, family, CONFIG, rank=2)


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
