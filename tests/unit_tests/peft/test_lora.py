# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Options of adapters that depend on the layer: an expert's rank, and what can't be had."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA

EXPERT = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1"
SHARED = "decoder.layers.0.mlp.shared_experts.linear_fc1"


def _linear() -> torch.nn.Module:
    linear = torch.nn.Linear(4, 4)
    linear.config = SimpleNamespace(moe_router_topk=4)
    return linear


@pytest.mark.parametrize("kind", [LoRA, DoRA, CanonicalLoRA])
def test_the_experts_of_a_token_share_the_rank(kind):
    peft = kind(dim=8, alpha=16, normalize_moe_lora=True)
    options = peft.options_for(_linear(), EXPERT)
    assert (type(options), options.dim, options.alpha) == (kind, 2, 16)
    assert peft.options_for(_linear(), SHARED) is peft
    assert kind(dim=8).options_for(_linear(), EXPERT).dim == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 6, "normalize_moe_lora": True}, r"peft\.dim=6 and model\.moe_router_topk=4: expected a multiple"),
        ({"experts_shared_outer_loras": True}, r"peft\.experts_shared_outer_loras=true, and .* is an expert's"),
        ({"lora_dtype": torch.bfloat16}, r"peft\.lora_dtype=torch\.bfloat16, and .* is in torch\.float32"),
    ],
)
def test_what_a_layer_cannot_have_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**options).options_for(_linear(), EXPERT)
    if "experts" in message:
        assert LoRA(**options).options_for(_linear(), SHARED).dim == 32


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DoRA, {}, r"peft\.share_expert_adapters=true with DoRA"),
        (LoRA, {"exclude_modules": ["*.local_experts.3.*"]}, r"'\*\.local_experts\.3\.\*' names single experts"),
    ],
)
def test_what_experts_cannot_share_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(share_expert_adapters=True, **options).check()


@pytest.mark.parametrize("option", ["a2a_experimental", "sequence_parallel_input_regather"])
def test_communication_of_another_kind_is_refused(option):
    with pytest.raises(ValueError, match=rf"peft\.{option}=True: expected false"):
        LoRA(**{option: True}).check()
