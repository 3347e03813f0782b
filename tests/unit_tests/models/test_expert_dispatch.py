# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How tokens reach their experts: as before, with some of them dropped, or refused."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.models import MixtralModelProvider
from megatron.bridge.models.expert_dispatch import apply_deepep, apply_flex_dispatcher_backend, apply_moe_token_drop
from megatron.bridge.utils.device import current_device
from megatron.bridge.utils.distributed import model_parallel_groups


def mixtral(**fields):
    sizes = dict(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8)
    experts = dict(moe_ffn_hidden_size=16, num_moe_experts=4, moe_router_topk=2)
    return MixtralModelProvider(**sizes, **experts, ffn_hidden_size=48, vocab_size=96, seq_length=16, **fields)


def logits(provider):
    with model_parallel_groups():
        (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
        tokens = torch.arange(16, device=current_device())[None]
        with torch.no_grad():
            return chunk.eval()(tokens, tokens, None).cpu()


def test_tokens_beyond_an_experts_room_are_dropped():
    full, roomy, tight = mixtral(), mixtral(), mixtral()
    apply_moe_token_drop(roomy, moe_expert_capacity_factor=2.0)
    apply_moe_token_drop(tight, moe_expert_capacity_factor=0.25)
    expected = logits(full)
    torch.testing.assert_close(logits(roomy), expected)
    assert not torch.allclose(logits(tight), expected)


def test_no_room_is_any_room():
    provider = mixtral(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)
    apply_moe_token_drop(provider, moe_expert_capacity_factor=-1.0)
    assert provider.moe_expert_capacity_factor is None and provider.moe_pad_expert_input_to_capacity is False


def test_more_room_than_there_are_tokens_is_not_padded():
    with pytest.raises(ValueError, match="which Core can't pad: lower it to 2 or less"):
        apply_moe_token_drop(mixtral(), moe_expert_capacity_factor=4.0)
    apply_moe_token_drop(mixtral(), moe_expert_capacity_factor=4.0, moe_pad_expert_input_to_capacity=False)


def test_a_dispatcher_that_drops_none_is_refused():
    with pytest.raises(ValueError, match="'allgather' drops no tokens: set it to 'alltoall'"):
        apply_moe_token_drop(mixtral(moe_token_dispatcher_type="allgather"))


def test_backends_are_refused_and_none_is_not():
    with_experts, without = SimpleNamespace(num_moe_experts=4), SimpleNamespace(num_moe_experts=None)
    apply_flex_dispatcher_backend(with_experts, None)
    apply_flex_dispatcher_backend(without, "deepep")
    apply_deepep(without)
    with pytest.raises(NotImplementedError, match="moe_flex_dispatcher_backend='hybridep'"):
        apply_flex_dispatcher_backend(with_experts, "hybridep")
    with pytest.raises(NotImplementedError, match="'deepep'"):
        apply_deepep(with_experts)
