# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The memory of activations, which the forward pass keeps for the backward pass. A formula, not a measurement.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022, section 4), which
counts what each layer of a GPT keeps in 16 bits: 34 bytes a token and hidden channel without the attention scores. The
same count for a gated MLP, grouped queries and no dropout, with fused attention, which keeps no scores ("selective"):

    norms and their outputs       8 H                      / TP with sequence parallelism
    norms of what attention and
    MLP give (Gemma 3, GLM-4)     4 H                      / TP with sequence parallelism
    norms of what experts and the
    MLP beside them give (Gemma 4),
    and what its router normalises
    in FP32 and scales           12 H                      / TP with sequence parallelism
    attention                     2 (Q + 2 K) + 2 Q        / TP
    norms of queries and keys     2 (Q + K)                / TP
    MLP                           2 F (gate) + 2 F (up) + 2 F (product)     / TP
    gate of attention's output    6 Q                      / TP
    latent attention instead      2 (2 Q + V) + 2 V        / TP
    what it projects down         4 L + 2 R                / TP with sequence parallelism
    a layer's own input           4 H + 6 P                / TP with sequence parallelism
    Gated DeltaNet instead        N (20 C + 36 k + 34 v + 4 k v / C + 32) + 8 (2 M k + N v)     / TP

in bytes a token, with H the hidden size, Q, K and V the channels of all query heads, of all query groups and of all
values, F the MLP's width, L the latent channels, kept before and after their norms, and R the channels of the key that
turn. Gated DeltaNet is what `delta_rule.py` keeps, mostly in FP32: N and M are the heads of values and keys, v and k
the channels of one, C the tokens of a chunk. P are the channels of a layer's own input (Gemma 4's E2B and E4B); what
passes from layer to layer there is counted once. A layer that takes another's keys and values keeps the keys that it
turned, and no values. The MLP of shared experts counts beside the experts. With context
parallelism a rank has 1 / CP of a sample's tokens; what it gets of other ranks' keys and values isn't counted. For the
paper's GPT (Q = K = H, F = 4 H, no gate: 4 F) this is its 34 H less the 2 H of its dropout masks.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megatron.bridge.models.delta_rule import CHUNK
from megatron.bridge.models.gemma3 import Gemma3ModelProvider
from megatron.bridge.models.gemma4 import Gemma4ModelProvider
from megatron.bridge.models.glm4 import GLM4ModelProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.latent_attention import MLAModelProvider
from megatron.bridge.models.layer_kinds import LayerKind, kind_of_layer
from megatron.bridge.models.olmo2 import OLMo2ModelProvider
from megatron.bridge.models.shared_keys import context_of

BYTES_PER_LOGIT = 8
"""16 bits from the matrix product, FP32 in the cross entropy, 16 bits of gradient."""


def layer_bytes_per_token(model: GPTModelProvider, kind: LayerKind) -> float:
    """What one layer of a kind keeps of one token, in bytes, on each tensor-parallel rank.

    Experts are assumed to be chosen evenly: each rank then works on as many (token, expert) pairs as its own tokens
    make.
    """
    tp = model.tensor_model_parallel_size
    sequence = tp if model.sequence_parallel else 1
    norms = (12 if isinstance(model, (Gemma3ModelProvider, GLM4ModelProvider)) else 8) * model.hidden_size / sequence
    attention = _mixer_bytes(model, kind)
    gates = 2 if model.gated_linear_unit else 1
    if not kind.is_moe:
        inputs = model.layer_input_channels()
        of_input = (4 * model.hidden_size + 6 * inputs) / sequence if inputs else 0
        return norms + attention + of_input + 2 * (gates + 1) * (model.sizes_of(kind).ffn_hidden_size or 0) / tp
    # What goes to an expert and comes back, and the expert's MLP, for each of a token's experts.
    etp = model.expert_tensor_parallel_size or tp
    routed = 4 * model.hidden_size + 2 * (gates + 1) * (model.moe_ffn_hidden_size or model.ffn_hidden_size) / etp
    shared = 2 * (gates + 1) * (model.moe_shared_expert_intermediate_size or 0) / tp
    beside = 12 * model.hidden_size / sequence if isinstance(model, Gemma4ModelProvider) else 0
    return norms + attention + shared + beside + model.moe_router_topk * routed * etp / tp


def _mixer_bytes(model: GPTModelProvider, kind: LayerKind) -> float:
    if kind.is_delta_net:
        return _delta_net_bytes(model)
    sizes = model.sizes_of(kind)
    return _latent_bytes(model) if isinstance(model, MLAModelProvider) else _attention_bytes(sizes)


def _delta_net_bytes(model: GPTModelProvider) -> float:
    """Of `GatedDeltaNet`, whose tensors of all chunks are kept."""
    chunk, keys, values = min(CHUNK, model.seq_length), model.linear_num_key_heads, model.linear_num_value_heads
    key, value = model.linear_key_head_dim, model.linear_value_head_dim
    assert keys and values and key and value, "checked by the provider"
    of_head = 20 * chunk + 36 * key + 34 * value + 4 * key * value / chunk + 32
    convolved = 8 * (2 * keys * key + values * value)
    return (values * of_head + convolved) / model.tensor_model_parallel_size


def _attention_bytes(model: GPTModelProvider) -> float:
    groups = model.num_query_groups or model.num_attention_heads
    channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    query, key = model.num_attention_heads * channels, groups * channels
    values = key if isinstance(model, Gemma4ModelProvider) else 0  # which are normalised, too
    normed = 2 * (query + key + values) if model.qk_layernorm or isinstance(model, OLMo2ModelProvider) else 0
    gated = 6 * query if model.attention_output_gate else 0  # its sigmoid in FP32, and the product
    if not model.num_kv_projections:
        return (2 * (query + key) + 2 * query + 2 * query) / model.tensor_model_parallel_size
    return (2 * (query + 2 * key) + 2 * query + normed + gated) / model.tensor_model_parallel_size


def _latent_bytes(model: MLAModelProvider) -> float:
    tp = model.tensor_model_parallel_size
    query = model.num_attention_heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    value = model.num_attention_heads * model.v_head_dim
    latent = 4 * ((model.q_lora_rank or 0) + model.kv_lora_rank) + 2 * model.qk_pos_emb_head_dim
    return (2 * (2 * query + value) + 2 * value) / tp + latent / (tp if model.sequence_parallel else 1)


def _context_bytes(model: GPTModelProvider) -> float:
    """What `LayerWithContext` hands from layer to layer, of one token: inputs and their norm, and copies at sources."""
    if not isinstance(model, Gemma4ModelProvider) or not (found := [*context_of(model)]):
        return 0.0
    sequence = model.tensor_model_parallel_size if model.sequence_parallel else 1
    inputs, keys = (sum(part) for part in zip(*found, strict=True))
    return 2 * inputs / sequence + 2 * keys


def activation_bytes(
    model: GPTModelProvider, *, kinds: Sequence[LayerKind], micro_batch_size: int, micro_batches_in_flight: int
) -> int:
    """What the layers of a pipeline stage keep at the peak of a step.

    Args:
        model: The provider. With `recompute_granularity="full"` a layer keeps its input alone, and one group of layers
            at a time all of it; "selective" is taken as fused attention, which keeps no scores anyway.
        kinds: Of each layer of the stage.
        micro_batch_size: Samples of one forward pass, of `model.seq_length` tokens each.
        micro_batches_in_flight: Forward passes whose backward pass is still to come.
    """
    tokens = micro_batch_size * model.seq_length / model.context_parallel_size
    context = round(tokens * _context_bytes(model) * micro_batches_in_flight)
    layers = [layer_bytes_per_token(model, kind) for kind in kinds]
    if model.recompute_granularity != "full" or not layers:
        return context + round(tokens * sum(layers) * micro_batches_in_flight)
    boundary = 2 * model.hidden_size / (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    if model.recompute_method == "block":  # the first layers are recomputed, the others keep all
        recomputed = min(model.recompute_num_layers, len(layers))
        kept = recomputed * boundary + sum(layers[recomputed:])
        return context + round(tokens * (kept * micro_batches_in_flight + max(layers)))
    group = model.recompute_num_layers or 1
    kept = -(-len(layers) // group) * boundary
    return context + round(tokens * (kept * micro_batches_in_flight + min(group, len(layers)) * max(layers)))


def logit_bytes(model: GPTModelProvider, *, micro_batch_size: int) -> int:
    """What the last stage holds for the loss of one micro-batch."""
    rows = model.padded_vocab_size() // model.tensor_model_parallel_size
    return BYTES_PER_LOGIT * micro_batch_size * (model.seq_length // model.context_parallel_size) * rows


def stage_bytes(
    model: GPTModelProvider, chunks: list[Any], *, micro_batch_size: int, num_micro_batches: int
) -> tuple[int, int]:
    """What this rank keeps at the peak of a step: (activations, logits), in bytes.

    In the 1F1B schedule a stage has one micro-batch in flight, and one more for each stage behind it.

    Args:
        model: The provider.
        chunks: This rank's, wrapped or not.
        micro_batch_size: Samples of one forward pass.
        num_micro_batches: Forward passes of a step.
    """
    plain = [unwrap_model(chunk) for chunk in chunks]
    behind = model.pipeline_model_parallel_size - parallel_state.get_pipeline_model_parallel_rank()
    activations = activation_bytes(
        model,
        kinds=[kind_of_layer(model, layer.layer_number) for chunk in plain for layer in chunk.decoder.layers],
        micro_batch_size=micro_batch_size,
        micro_batches_in_flight=min(behind, num_micro_batches),
    )
    has_logits = any(chunk.post_process for chunk in plain)
    return activations, logit_bytes(model, micro_batch_size=micro_batch_size) if has_logits else 0
