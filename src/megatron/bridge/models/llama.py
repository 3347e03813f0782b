# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Llama family: Llama 1 to 3.x, SmolLM2, and every other `LlamaForCausalLM`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F

from megatron.bridge.models.conversion.hf_config import (
    dtype_fields,
    expect_value,
    rope_parameters,
    vocabulary_fields,
)
from megatron.bridge.models.conversion.mapping import (
    fused_gate_up,
    fused_qkv,
    replicated,
    split_columns,
    vocabulary,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gpt_provider import GPTModelProvider


@dataclass
class LlamaModelProvider(GPTModelProvider):
    """What all Llamas share: RMSNorm, rotary positions, a gated SiLU MLP, no biases, no dropout."""

    normalization: str = "RMSNorm"
    activation_func: Callable = F.silu
    gated_linear_unit: bool = True
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "rope"
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
class Llama3ModelProvider(LlamaModelProvider):
    """Llama 3's defaults: grouped queries and a rotary base for long sequences."""

    num_query_groups: int | None = 8
    seq_length: int = 8192
    rotary_base: float = 500_000
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.01


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A `LlamaConfig`, as a dict, in provider fields."""
    expect_value(hf, "hidden_act", "silu", default="silu")
    expect_value(hf, "mlp_bias", hf.get("attention_bias", False), default=False)
    heads = hf["num_attention_heads"]
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "seq_length": hf.get("max_position_embeddings", 2048),
        "vocab_size": hf["vocab_size"],
        **vocabulary_fields(hf["vocab_size"]),
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "init_method_std": hf.get("initializer_range", 0.02),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "add_bias_linear": hf.get("attention_bias", False),
        "share_embeddings_and_output_weights": hf.get("tie_word_embeddings", False),
        **rope_parameters(hf),
        **dtype_fields(hf),
    }


_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def _layer_mappings(kind: str) -> tuple:
    """The mappings of a layer's weights (`kind` "weight") or biases ("bias") in its linear layers."""
    split_output = split_columns if kind == "weight" else replicated
    return (
        fused_qkv(
            f"{_MEGATRON}self_attention.linear_qkv.{kind}",
            q=f"{_HF}self_attn.q_proj.{kind}",
            k=f"{_HF}self_attn.k_proj.{kind}",
            v=f"{_HF}self_attn.v_proj.{kind}",
        ),
        split_output(f"{_MEGATRON}self_attention.linear_proj.{kind}", f"{_HF}self_attn.o_proj.{kind}"),
        fused_gate_up(
            f"{_MEGATRON}mlp.linear_fc1.{kind}", gate=f"{_HF}mlp.gate_proj.{kind}", up=f"{_HF}mlp.up_proj.{kind}"
        ),
        split_output(f"{_MEGATRON}mlp.linear_fc2.{kind}", f"{_HF}mlp.down_proj.{kind}"),
    )


FAMILY = ModelFamily(
    provider_class=LlamaModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *_layer_mappings("weight"),
        *_layer_mappings("bias"),
        # Core's local layers keep the norms by themselves, Transformer Engine's inside the linear layer that follows.
        replicated(f"{_MEGATRON}input_layernorm.weight", f"{_HF}input_layernorm.weight"),
        replicated(f"{_MEGATRON}self_attention.linear_qkv.layer_norm_weight", f"{_HF}input_layernorm.weight"),
        replicated(f"{_MEGATRON}pre_mlp_layernorm.weight", f"{_HF}post_attention_layernorm.weight"),
        replicated(f"{_MEGATRON}mlp.linear_fc1.layer_norm_weight", f"{_HF}post_attention_layernorm.weight"),
        replicated("decoder.final_layernorm.weight", "model.norm.weight"),
        vocabulary("output_layer.weight", "lm_head.weight"),
    ),
    ignored_tensors=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
