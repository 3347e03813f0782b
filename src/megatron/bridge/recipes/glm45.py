# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""GLM-4.5 and GLM-4.5-Air, without the layers that predict further tokens."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(layers: int, hidden: int, ffn: int, *, experts: int, expert_ffn: int, dense: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": 96,
        "vocab_size": 151552,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": expert_ffn,
        "moe_shared_expert_intermediate_size": expert_ffn,
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
    }


_ATTENTION = ("linear_qkv", "linear_proj")

FAMILY = Family(
    provider="megatron.bridge.models.glm4_moe.GLM45ModelProvider",
    sizes={
        "glm45_air_106b": ModelSize(
            hf_name="zai-org/GLM-4.5-Air",
            parameters=106_852_251_264,
            fields={
                **_shape(46, 4096, 10944, experts=128, expert_ffn=1408, dense=1),
                "moe_router_topk_scaling_factor": 1.0,
            },
            full=Layout(gpus=64, tp=4, pp=2, ep=32, etp=1),
            adapters=Layout(gpus=8, tp=4, ep=8, etp=1),
            adapted=_ATTENTION,
        ),
        "glm45_355b": ModelSize(
            hf_name="zai-org/GLM-4.5",
            parameters=352_797_829_024,
            fields={
                **_shape(92, 5120, 12288, experts=160, expert_ffn=1536, dense=3),
                "moe_router_topk_scaling_factor": 2.5,
                "qk_layernorm": True,
            },
            full=Layout(gpus=256, tp=4, pp=4, ep=32, etp=1),
            adapters=Layout(gpus=16, tp=4, ep=16, etp=1),
            adapted=_ATTENTION,
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
