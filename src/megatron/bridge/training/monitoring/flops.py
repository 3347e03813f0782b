# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floating point operations of a training step, by formula."""

from collections.abc import Iterable
from typing import Any


def train_step_flops(model: Any, batch_shapes: Iterable[tuple[int, int]]) -> int:
    """Operations of the matrix products in the forward and backward pass of a dense GPT.

    A product of [m, k] and [k, n] counts 2mkn. The backward pass counts twice the forward pass. Causal attention counts
    the half that the mask keeps. Recomputation, norms and the optimizer don't count (as in Narayanan et al. 2021,
    appendix, and Megatron-LM).

    Args:
        model: The model's provider.
        batch_shapes: [B, S] of each micro-batch.
    """
    head_size = model.kv_channels or model.hidden_size // model.num_attention_heads
    query_size = head_size * model.num_attention_heads
    kv_size = head_size * (model.num_query_groups or model.num_attention_heads)
    projections = model.hidden_size * (2 * query_size + 2 * kv_size)
    mlp = model.hidden_size * model.ffn_hidden_size * (3 if model.gated_linear_unit else 2)
    output = model.hidden_size * model.padded_vocab_size()
    forward = 0
    for batch_size, seq_length in batch_shapes:
        attention = seq_length * query_size  # scores and weighted sum, half of each masked
        forward += 2 * batch_size * seq_length * (model.num_layers * (projections + mlp + attention) + output)
    return 3 * forward
