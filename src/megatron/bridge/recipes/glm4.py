# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""GLM-4-0414, without experts."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(layers: int, hidden: int, ffn: int, heads: int, *, bias: bool) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "vocab_size": 151552,
        "add_qkv_bias": bias,
    }


FAMILY = Family(
    provider="megatron.bridge.models.glm4.GLM4ModelProvider",
    sizes={
        "glm4_9b": ModelSize(
            hf_name="zai-org/GLM-4-9B-0414",
            parameters=9_400_279_040,
            fields=_shape(40, 4096, 13696, 32, bias=True),
            full=Layout(gpus=8, tp=2, pp=2),
        ),
        "glm4_32b": ModelSize(
            hf_name="zai-org/GLM-4-32B-0414",
            parameters=32_566_081_536,
            fields=_shape(61, 6144, 23040, 48, bias=False),
            full=Layout(gpus=16, tp=8),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
