# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import torch
from megatron.core.transformer import TransformerConfig

from megatron.bridge.models.expert_bias import in_16_bits


def chunk_with_router():
    chunk, router = torch.nn.Module(), torch.nn.Module()
    router.weight = torch.nn.Parameter(torch.ones(3, 2))
    router.register_buffer("expert_bias", torch.tensor([0.1, 2.00001, -3.3]))
    router.register_buffer("local_tokens_per_expert", torch.tensor([257.0, 0.0, 1.0]))
    router.register_buffer("of_another_kind", torch.ones(1))
    chunk.router = router
    return chunk


def test_the_bias_and_the_counts_stay_in_fp32():
    """In bf16 a bias of 2.00001 is 2, and a count of 257 is 256."""
    chunk = chunk_with_router()
    before = {name: buffer.clone() for name, buffer in chunk.named_buffers()}
    config = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1, bf16=True)
    in_16_bits([chunk], config)
    assert chunk.router.weight.dtype is chunk.router.of_another_kind.dtype is torch.bfloat16
    for name in ("router.expert_bias", "router.local_tokens_per_expert"):
        found = chunk.get_buffer(name)
        assert found.dtype is torch.float32 and torch.equal(found, before[name])
