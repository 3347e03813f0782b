# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The GLM-4.5 family, GLM-4.6 and 4.7 too: half of each head turns, biased sigmoid routers, and a shared expert."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.biased_router import (
    EXPERT_BIAS_MAPPING,
    BiasedRouterModelProvider,
    biased_router_fields,
    shared_expert_mappings,
)
from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    QK_NORM_MAPPINGS,
    attention_mappings,
    decoder_fields,
    expert_mappings,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class GLM45ModelProvider(BiasedRouterModelProvider):
    """What all GLM-4.5 share."""

    add_qkv_bias: bool = True
    kv_channels: int | None = 128
    num_query_groups: int | None = 8
    seq_length: int = 131_072
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 1_000_000
    rotary_percent: float = 0.5
    num_moe_experts: int | None = 128
    moe_router_topk: int = 8


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **decoder_fields(hf, partial_rotary=True),
        **biased_router_fields(hf),
        "add_qkv_bias": hf["attention_bias"],
        "qk_layernorm": hf["use_qk_norm"],
    }


FAMILY = ModelFamily(
    provider_class=GLM45ModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *DECODER_MAPPINGS,
        attention_mappings("bias")[0],  # the output has none
        *QK_NORM_MAPPINGS,
        *expert_mappings("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        *shared_expert_mappings("mlp.shared_experts"),
        EXPERT_BIAS_MAPPING,
    ),
    has_further_layers=True,
)
