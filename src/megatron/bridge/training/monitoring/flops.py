# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floating point operations of a training step, by formula."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from megatron.bridge.models.delta_rule import CHUNK
from megatron.bridge.models.latent_attention import MLAModelProvider
from megatron.bridge.models.layer_kinds import LayerKind, kinds_of_layers


def train_step_flops(model: Any, batch_shapes: Iterable[tuple[int, int]]) -> int:
    """Operations of the matrix products in the forward and backward pass of a GPT.

    A product of [m, k] and [k, n] counts 2mkn. The backward pass counts twice the forward pass. Attention counts the
    part of the scores that the mask keeps: half where it is causal, less with a sliding window. Experts count as often
    as tokens take them, beside their router and the shared one. Recomputation, norms, short convolutions and the
    optimizer don't count (as in Narayanan et al. 2021, appendix, and Megatron-LM).

    Args:
        model: The model's provider.
        batch_shapes: [B, S] of each micro-batch.
    """
    kinds = Counter(kinds_of_layers(model))
    # Beside the output layer, what projects embeddings to inputs of the layers.
    inputs = model.num_layers * model.layer_input_channels()
    ends = model.hidden_size * (model.padded_vocab_size() + inputs)
    forward = 0
    for batch_size, length in batch_shapes:
        weights = ends + sum(number * _weights_a_token_meets(model, kind) for kind, number in kinds.items())
        mixing = sum(number * _mixing_flops(model, kind, length) for kind, number in kinds.items())
        forward += batch_size * (2 * length * weights + mixing)
    return 3 * forward


def _weights_a_token_meets(model: Any, kind: LayerKind) -> int:
    """The elements of the matrices that a layer multiplies each token with."""
    matrices = 3 if model.gated_linear_unit else 2
    sizes = model.sizes_of(kind)
    mixer = _delta_net_weights(model) if kind.is_delta_net else _attention_weights(sizes)
    if not kind.is_moe:
        of_input = 2 * model.layer_input_channels()
        return mixer + model.hidden_size * (matrices * sizes.ffn_hidden_size + of_input)
    shared = model.moe_shared_expert_intermediate_size or 0
    widths = model.moe_router_topk * (model.moe_ffn_hidden_size or model.ffn_hidden_size) + shared
    router = model.num_moe_experts + bool(shared and model.moe_shared_expert_gate)
    return mixer + model.hidden_size * (matrices * widths + router)


def _attention_weights(model: Any) -> int:
    hidden, heads = model.hidden_size, model.num_attention_heads
    query, value = _channels(model)
    if isinstance(model, MLAModelProvider):
        low, latent = model.q_lora_rank, model.kv_lora_rank
        queries = low * (hidden + query) if low else hidden * query
        keys_and_values = heads * (model.qk_head_dim + model.v_head_dim)
        down = hidden * (latent + model.qk_pos_emb_head_dim)
        return queries + down + latent * keys_and_values + value * hidden
    groups = model.num_query_groups or heads
    gates = 1 if model.attention_output_gate else 0
    return hidden * ((2 + gates) * query + model.num_kv_projections * query // heads * groups)


def _channels(model: Any) -> tuple[int, int]:
    """Of all heads' queries, and of what all heads give."""
    heads = model.num_attention_heads
    if isinstance(model, MLAModelProvider):
        return heads * (model.qk_head_dim + model.qk_pos_emb_head_dim), heads * model.v_head_dim
    channels = heads * (model.kv_channels or model.hidden_size // heads)
    return channels, channels


def _delta_net_weights(model: Any) -> int:
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = model.linear_num_value_heads * model.linear_value_head_dim
    return model.hidden_size * (2 * keys + 3 * values + 2 * model.linear_num_value_heads)


def _mixing_flops(model: Any, kind: LayerKind, length: int) -> int:
    """Operations of a layer's products of tokens with tokens, for a row of that many tokens."""
    if not kind.is_delta_net:
        window = min(kind.window or length, length)
        channels = sum(_channels(model.sizes_of(kind)))  # of scores, and of the weighted sum
        return (2 * length - window) * window * channels
    # See `gated_delta_rule`. Within a chunk: the system, its solution (a triangle, so half), and the scores twice;
    # with the state: what it says of keys and of queries, and what is added to it.
    chunk, key, value = min(CHUNK, length), model.linear_key_head_dim, model.linear_value_head_dim
    within = 2 * chunk * (2 * key + value) + chunk * (key + value)
    return model.linear_num_value_heads * length * (within + 6 * key * value)
