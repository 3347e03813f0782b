# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Experts as in DeepSeek-V3 and the families after it: biased sigmoid routers, shared experts, dense first layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.bridge.models.conversion.mapping import WeightMapping, fused_gate_up, replicated, split_columns
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import HF_LAYER, LAYER
from megatron.bridge.models.group_routing import GroupedRouterModelProvider, group_fields


@dataclass
class BiasedRouterModelProvider(GroupedRouterModelProvider):
    """Experts chosen by the sigmoid of the router's output and a bias, which balances their load without a loss."""

    moe_router_score_function: Literal["softmax", "sigmoid"] = "sigmoid"
    moe_router_enable_expert_bias: bool = True
    moe_router_bias_update_rate: float = 0.0
    """How far the bias of each expert moves after a step. 0: it stays as it was pretrained."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    moe_router_load_balancing_type: str | list[str] = "seq_aux_loss"
    moe_aux_loss_coeff: float | list[float] = 0.0


def layered_expert_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have experts, how many and how wide, and the MLP of shared experts beside them.

    Args:
        hf: From `as_read_by_transformers`, as below.

    Returns:
        The provider's fields; without experts, if all layers are dense.
    """
    layers, dense, width = hf["num_hidden_layers"], hf["first_k_dense_replace"], hf["moe_intermediate_size"]
    if dense >= layers:
        return {"num_moe_experts": None, "moe_router_enable_expert_bias": False, "moe_grouped_gemm": False}
    return {
        "num_moe_experts": hf["n_routed_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * hf["n_shared_experts"] or None,
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
    }


def biased_router_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """As `layered_expert_fields`, with routers that choose by a biased sigmoid.

    Raises:
        ValueError: Core's router can't choose in that way.
    """
    fields = layered_expert_fields(hf)
    if fields["num_moe_experts"] is None:
        return fields
    # Core's weights add up to 1 unless there is but one.
    expect_value(hf, "norm_topk_prob", hf["num_experts_per_tok"] > 1)
    # To a sigmoid it says nothing, but Core asks for it where a token takes one expert.
    return {**fields, **group_fields(hf), "moe_router_pre_softmax": hf["num_experts_per_tok"] == 1}


EXPERT_BIAS_MAPPING = replicated(f"{LAYER}mlp.router.expert_bias", f"{HF_LAYER}mlp.gate.e_score_correction_bias")


def shared_expert_mappings(block: str) -> tuple[WeightMapping, ...]:
    """The MLP of the experts that every token goes to.

    Args:
        block: Hugging Face's name of it in a layer, such as `mlp.shared_experts`.
    """
    gate, up, down = (f"{HF_LAYER}{block}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return (
        fused_gate_up(f"{LAYER}mlp.shared_experts.linear_fc1.weight", gate=gate, up=up),
        split_columns(f"{LAYER}mlp.shared_experts.linear_fc2.weight", down),
    )
