# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Qwen3-MoE family: Qwen3's attention with experts in all, or in some, of the layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    QK_NORM_MAPPINGS,
    ExpertsModelProvider,
    decoder_fields,
    expert_fields,
    expert_mappings,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class Qwen3MoEModelProvider(ExpertsModelProvider):
    """What all Qwen3 with experts share."""

    qk_layernorm: bool = True
    kv_channels: int | None = 128
    seq_length: int = 40960
    rotary_base: float = 1_000_000
    num_moe_experts: int | None = 128
    moe_router_topk: int = 8


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    expect_value(hf, "attention_bias", False)
    expect_value(hf, "use_sliding_window", False)
    dense, step = hf["mlp_only_layers"], hf["decoder_sparse_step"]
    layers = range(hf["num_hidden_layers"])
    return {
        **decoder_fields(hf),
        **expert_fields(hf, ffn_hidden_size=hf["moe_intermediate_size"]),
        "moe_layer_freq": [int(layer not in dense and (layer + 1) % step == 0) for layer in layers],
        # Weights of the chosen experts that don't add up to 1 are those of a softmax over all.
        "moe_router_pre_softmax": not hf["norm_topk_prob"],
    }


FAMILY = ModelFamily(
    provider_class=Qwen3MoEModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *DECODER_MAPPINGS,  # some layers may have an MLP
        *QK_NORM_MAPPINGS,
        *expert_mappings("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
)
