# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Qwen3-Next family: Gated DeltaNet layers and, every fourth, gated attention; experts beside a shared one.

What Qwen3.5 has of it too is here as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.bridge.models.biased_router import shared_expert_mappings
from megatron.bridge.models.conversion.hybrid_mapping import delta_net_channels, delta_net_in_proj, fused_gated_qkv
from megatron.bridge.models.conversion.mapping import WeightMapping, replicated, split_columns, split_rows
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    HF_LAYER,
    LAYER,
    NORM_MAPPINGS,
    QK_NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    DecoderModelProvider,
    ExpertsModelProvider,
    decoder_fields,
    expert_fields,
    expert_mappings,
    mlp_mappings,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gpt_provider import LayerSpec
from megatron.bridge.models.hybrid_layers import delta_net_spec


@dataclass
class DeltaNetModelProvider(DecoderModelProvider):
    """Gated DeltaNet layers beside gated attention. The `linear_` fields, Core's, are their sizes and places."""

    linear_attention_freq: int | list[int] | None = 4
    attention_output_gate: bool = True
    qk_layernorm: bool = True
    layernorm_zero_centered_gamma: bool = True
    layernorm_epsilon: float = 1e-6
    kv_channels: int | None = 256
    seq_length: int = 262_144
    rotary_base: float = 10_000_000
    rotary_percent: float = 0.25

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for heads that the tensor-parallel ranks can't share.
        """
        keys, values, ranks = self.linear_num_key_heads, self.linear_num_value_heads, self.tensor_model_parallel_size
        if not keys or not values or values % keys:
            raise ValueError(
                f"model.linear_num_value_heads={values} is no multiple of model.linear_num_key_heads={keys}: "
                "each key head serves the same number of value heads"
            )
        if keys % ranks:
            raise ValueError(
                f"model.linear_num_key_heads={keys} is no multiple of model.tensor_model_parallel_size={ranks}: each "
                "rank computes whole heads"
            )
        if self.context_parallel_size > 1:
            raise ValueError(
                f"model.context_parallel_size={self.context_parallel_size}: a Gated DeltaNet layer's state passes "
                "through the whole sequence, which one rank must hold; set it to 1"
            )
        super().finalize()

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        return delta_net_spec(super()._layer_spec(vp_stage))


@dataclass
class Qwen3NextModelProvider(DeltaNetModelProvider, ExpertsModelProvider):
    """What all Qwen3-Next share."""

    num_moe_experts: int | None = 512
    moe_router_topk: int = 10
    moe_shared_expert_intermediate_size: int | None = 512
    moe_shared_expert_gate: bool = True
    # As of `ExpertsModelProvider`: a dataclass takes the defaults of its first base, which has Core's of them.
    moe_aux_loss_coeff: float | list[float] = ExpertsModelProvider.moe_aux_loss_coeff
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = ExpertsModelProvider.moe_token_dispatcher_type
    moe_grouped_gemm: bool = ExpertsModelProvider.moe_grouped_gemm


def delta_net_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a decoder with Gated DeltaNet layers."""
    expect_value(hf, "attention_bias", False)
    kinds = {"linear_attention": 1, "full_attention": 0}
    unknown = sorted({kind for kind in hf["layer_types"] if kind not in kinds})
    if unknown:
        raise ValueError(f"config.json: layer_types has {unknown}: expected {sorted(kinds)}")
    return {
        **decoder_fields(hf, partial_rotary=True),
        "linear_attention_freq": [kinds[kind] for kind in hf["layer_types"]],
        "linear_conv_kernel_dim": hf["linear_conv_kernel_dim"],
        "linear_key_head_dim": hf["linear_key_head_dim"],
        "linear_value_head_dim": hf["linear_value_head_dim"],
        "linear_num_key_heads": hf["linear_num_key_heads"],
        "linear_num_value_heads": hf["linear_num_value_heads"],
    }


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    dense, step = hf["mlp_only_layers"], hf["decoder_sparse_step"]
    layers = range(hf["num_hidden_layers"])
    return {
        **delta_net_fields(hf),
        **expert_fields(hf, ffn_hidden_size=hf["moe_intermediate_size"]),
        "moe_shared_expert_intermediate_size": hf["shared_expert_intermediate_size"],
        "moe_layer_freq": [int(layer not in dense and (layer + 1) % step == 0) for layer in layers],
        "moe_router_pre_softmax": not hf["norm_topk_prob"],
    }


_HF_ATTENTION, _HF_LINEAR = f"{HF_LAYER}self_attn.", f"{HF_LAYER}linear_attn."
_ATTENTION = f"{LAYER}self_attention."


def hybrid_mappings(in_proj: WeightMapping) -> tuple[WeightMapping, ...]:
    """All but MLP and experts; `in_proj` is the row of Gated DeltaNet's input projection."""
    return (
        *VOCABULARY_MAPPINGS,
        *NORM_MAPPINGS,
        *QK_NORM_MAPPINGS,
        fused_gated_qkv(
            f"{_ATTENTION}linear_qkv.weight",
            q=f"{_HF_ATTENTION}q_proj.weight",
            k=f"{_HF_ATTENTION}k_proj.weight",
            v=f"{_HF_ATTENTION}v_proj.weight",
        ),
        split_columns(f"{_ATTENTION}linear_proj.weight", f"{_HF_ATTENTION}o_proj.weight"),
        replicated(f"{_ATTENTION}in_proj.layer_norm_weight", f"{HF_LAYER}input_layernorm.weight"),
        in_proj,
        delta_net_channels(f"{_ATTENTION}conv_weight", f"{_HF_LINEAR}conv1d.weight"),
        split_rows(f"{_ATTENTION}dt_bias", f"{_HF_LINEAR}dt_bias"),
        split_rows(f"{_ATTENTION}A_log", f"{_HF_LINEAR}A_log"),
        replicated(f"{_ATTENTION}norm_weight", f"{_HF_LINEAR}norm.weight"),
        split_columns(f"{_ATTENTION}out_proj.weight", f"{_HF_LINEAR}out_proj.weight"),
    )


EXPERT_MAPPINGS = (
    *expert_mappings("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *shared_expert_mappings("mlp.shared_expert"),
    replicated(f"{LAYER}mlp.shared_experts.gate_weight", f"{HF_LAYER}mlp.shared_expert_gate.weight"),
)

FAMILY = ModelFamily(
    provider_class=Qwen3NextModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *hybrid_mappings(
            delta_net_in_proj(
                f"{_ATTENTION}in_proj.weight",
                qkvz=f"{_HF_LINEAR}in_proj_qkvz.weight",
                ba=f"{_HF_LINEAR}in_proj_ba.weight",
            )
        ),
        *mlp_mappings("weight"),  # some layers may have an MLP
        *EXPERT_MAPPINGS,
    ),
    has_further_layers=True,
)
