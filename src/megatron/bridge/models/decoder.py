# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the families have in common: RMSNorm before attention and MLP, rotary positions, a gated SiLU MLP or experts.

A family's file takes these parts and adds its differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F

from megatron.bridge.models.conversion.fp8_blocks import block_size
from megatron.bridge.models.conversion.hf_config import dtype_fields, vocabulary_fields
from megatron.bridge.models.conversion.mapping import (
    WeightMapping,
    fused_gate_up,
    fused_qkv,
    gate_up_in_one,
    replicated,
    split_columns,
    vocabulary,
)
from megatron.bridge.models.conversion.rope_fields import rope_fields
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.gpt_provider import GPTModelProvider, PositionEmbeddingType


@dataclass
class DecoderModelProvider(GPTModelProvider):
    """RMSNorm, rotary positions, a gated SiLU MLP, no biases, no dropout."""

    normalization: str = "RMSNorm"
    activation_func: Callable = F.silu
    gated_linear_unit: bool = True
    position_embedding_type: PositionEmbeddingType = "rope"
    add_bias_linear: bool = False
    share_embeddings_and_output_weights: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    bias_activation_fusion: bool = True
    bias_dropout_fusion: bool = True
    masked_softmax_fusion: bool = True
    apply_rope_fusion: bool = True
    gradient_accumulation_fusion: bool = True


@dataclass
class ExpertsModelProvider(DecoderModelProvider):
    """Experts in place of the MLP: each token goes to the best of them, with a loss that keeps them evenly used."""

    num_moe_experts: int | None = 8
    moe_router_topk: int = 2
    moe_router_load_balancing_type: str | list[str] = "aux_loss"
    moe_aux_loss_coeff: float | list[float] = 1e-3
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    moe_grouped_gemm: bool = True


def decoder_fields(hf: Mapping[str, Any], *, partial_rotary: bool = False) -> dict[str, Any]:
    """The fields that every family reads alike from a Hugging Face configuration.

    Args:
        hf: From `as_read_by_transformers`, as in all functions here.
        partial_rotary: Whether the family turns a part of each head's channels, `partial_rotary_factor`.

    Raises:
        ValueError: The configuration asks for what can't be expressed.
    """
    expect_value(hf, "hidden_act", "silu")
    if block_size(hf.get("quantization_config")) is None:
        expect_value(hf, "quantization_config", None)
    for key in ("transformers_weights", "per_layer_config"):
        expect_value(hf, key, None)
    heads = hf["num_attention_heads"]
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "seq_length": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        **vocabulary_fields(hf["vocab_size"]),
        "layernorm_epsilon": hf["rms_norm_eps"],
        "init_method_std": hf["initializer_range"],
        "attention_dropout": hf["attention_dropout"],
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"],
        **rope_fields(hf, partial=partial_rotary),
        **dtype_fields(hf),
    }


_LAYER_TYPES = {"full_attention", "sliding_attention"}


def bias_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Whether linear layers have biases, of a config.json that has a key for attention and one for the MLP.

    Raises:
        ValueError: One of them has biases, and the other doesn't.
    """
    attention, mlp = hf["attention_bias"], hf["mlp_bias"]
    if attention != mlp:
        raise ValueError(
            f"config.json: attention_bias={attention} with mlp_bias={mlp} is not supported for {hf['architectures']}: "
            "Core has one switch for the biases of both; need both or neither"
        )
    return {"add_bias_linear": attention}


def window_fields(hf: Mapping[str, Any], *, layer_types: Sequence[str] | None = None) -> dict[str, Any]:
    """Sliding-window attention: each token attends to the last `sliding_window` tokens, itself included.

    Args:
        hf: As for `decoder_fields`.
        layer_types: `full_attention` or `sliding_attention` for each layer, in families where layers differ.

    Raises:
        ValueError: Layers with a window whose size isn't given or is none, or of another type.
    """
    window = hf["sliding_window"]
    if not _LAYER_TYPES.issuperset(layer_types or ()):
        raise ValueError(f"config.json: layer_types={layer_types!r} is not supported: need {sorted(_LAYER_TYPES)}")
    slides = [int(kind == "sliding_attention") for kind in layer_types or ["sliding_attention"]]
    if window is None and layer_types and any(slides):
        raise ValueError(
            "config.json: layer_types names sliding_attention, and there is no window (sliding_window, "
            "use_sliding_window): set them, or correct layer_types"
        )
    if window is None or not any(slides):
        return {}
    if window < 1:
        raise ValueError(f"config.json: sliding_window={window}: expected 1 or more, or null for full attention")
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": None if all(slides) else slides,
        "masked_softmax_fusion": False,  # Core's fused kernel knows no window
    }


def expert_fields(hf: Mapping[str, Any], *, ffn_hidden_size: int) -> dict[str, Any]:
    """The router and the experts, each with an MLP of `ffn_hidden_size`.

    Raises:
        ValueError: The configuration asks for what can't be expressed.
    """
    expect_value(hf, "router_jitter_noise", 0.0)
    if hf["num_experts_per_tok"] == 1 and hf.get("norm_topk_prob", True):
        raise ValueError(
            "config.json: num_experts_per_tok=1 with weights that add up to 1 (norm_topk_prob) is not supported: Core "
            "has no router for it; need 2 or more"
        )
    return {
        # Qwen publishes num_experts, and transformers 5 saves it as num_local_experts.
        "num_moe_experts": hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        "moe_ffn_hidden_size": ffn_hidden_size,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_aux_loss_coeff": hf["router_aux_loss_coef"],
    }


LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


def attention_mappings(kind: str) -> tuple[WeightMapping, ...]:
    """Query, key, value and output of a layer: `kind` "weight" or "bias"."""
    output = split_columns if kind == "weight" else replicated
    return (
        fused_qkv(
            f"{LAYER}self_attention.linear_qkv.{kind}",
            q=f"{HF_LAYER}self_attn.q_proj.{kind}",
            k=f"{HF_LAYER}self_attn.k_proj.{kind}",
            v=f"{HF_LAYER}self_attn.v_proj.{kind}",
        ),
        output(f"{LAYER}self_attention.linear_proj.{kind}", f"{HF_LAYER}self_attn.o_proj.{kind}"),
    )


def mlp_mappings(kind: str) -> tuple[WeightMapping, ...]:
    """The gated MLP of a layer: `kind` "weight" or "bias"."""
    output = split_columns if kind == "weight" else replicated
    gate, up = f"{HF_LAYER}mlp.gate_proj.{kind}", f"{HF_LAYER}mlp.up_proj.{kind}"
    return (
        fused_gate_up(f"{LAYER}mlp.linear_fc1.{kind}", gate=gate, up=up),
        output(f"{LAYER}mlp.linear_fc2.{kind}", f"{HF_LAYER}mlp.down_proj.{kind}"),
    )


def gate_up_in_one_mappings() -> tuple[WeightMapping, ...]:
    """The gated MLP of a layer, in files with gate and up in one tensor."""
    return (
        gate_up_in_one(f"{LAYER}mlp.linear_fc1.weight", f"{HF_LAYER}mlp.gate_up_proj.weight"),
        split_columns(f"{LAYER}mlp.linear_fc2.weight", f"{HF_LAYER}mlp.down_proj.weight"),
    )


def expert_mappings(
    block: str, *, gate: str, up: str, down: str, router: str = "gate", kind: str = "weight"
) -> tuple[WeightMapping, ...]:
    """Router and experts of a layer, in Core's module for each expert and in Transformer Engine's grouped one.

    Args:
        block: Hugging Face's name of the layer's experts' block; empty: they are in none.
        gate: Its name of an expert's gate matrix.
        up: Its name of the matrix that the gate multiplies.
        down: Its name of the output matrix.
        router: Its name of the router.
        kind: "weight" or "bias".
    """
    within = f"{HF_LAYER}{block}." if block else HF_LAYER
    expert = f"{within}experts.{{expert}}."
    gate, up, down = (f"{expert}{name}.{kind}" for name in (gate, up, down))
    one_module, grouped = f"{LAYER}mlp.experts.local_experts.{{expert}}.", f"{LAYER}mlp.experts."
    output = split_columns if kind == "weight" else replicated
    return (
        replicated(f"{LAYER}mlp.router.{kind}", f"{within}{router}.{kind}"),
        fused_gate_up(f"{one_module}linear_fc1.{kind}", gate=gate, up=up),
        output(f"{one_module}linear_fc2.{kind}", down),
        fused_gate_up(f"{grouped}linear_fc1.{kind}{{expert}}", gate=gate, up=up),
        output(f"{grouped}linear_fc2.{kind}{{expert}}", down),
    )


# Core's local layers keep the norms by themselves, Transformer Engine's inside the linear layer that follows.
INPUT_NORM_MAPPINGS = (
    replicated(f"{LAYER}input_layernorm.weight", f"{HF_LAYER}input_layernorm.weight"),
    replicated(f"{LAYER}self_attention.linear_qkv.layer_norm_weight", f"{HF_LAYER}input_layernorm.weight"),
)
FINAL_NORM_MAPPING = replicated("decoder.final_layernorm.weight", "model.norm.weight")
NORM_MAPPINGS = (
    *INPUT_NORM_MAPPINGS,
    replicated(f"{LAYER}pre_mlp_layernorm.weight", f"{HF_LAYER}post_attention_layernorm.weight"),
    replicated(f"{LAYER}mlp.linear_fc1.layer_norm_weight", f"{HF_LAYER}post_attention_layernorm.weight"),
    FINAL_NORM_MAPPING,
)
QK_NORM_MAPPINGS = (
    replicated(f"{LAYER}self_attention.q_layernorm.weight", f"{HF_LAYER}self_attn.q_norm.weight"),
    replicated(f"{LAYER}self_attention.k_layernorm.weight", f"{HF_LAYER}self_attn.k_norm.weight"),
)
VOCABULARY_MAPPINGS = (
    vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    vocabulary("output_layer.weight", "lm_head.weight"),
)
DECODER_MAPPINGS = (*VOCABULARY_MAPPINGS, *NORM_MAPPINGS, *attention_mappings("weight"), *mlp_mappings("weight"))
"""The weights of a dense decoder without biases."""
IGNORED_TENSORS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
"""What old files hold and no model needs."""
