# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Qwen3.5 without experts, its language model: attention in every fourth layer, else Gated DeltaNet."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize

ADAPTED = ("linear_qkv", "linear_proj", "in_proj", "out_proj")
"""Attention and Gated DeltaNet."""


def shape(layers: int, hidden: int, ffn: int, heads: int, *, groups: int, value_heads: int) -> dict[str, Any]:
    """The fields of a size, with an MLP or with experts."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "vocab_size": 248320,
        "linear_attention_freq": [int((layer + 1) % 4 != 0) for layer in range(layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
    }


FAMILY = Family(
    provider="megatron.bridge.models.qwen3_5.Qwen35ModelProvider",
    sizes={
        "qwen35_text_9b": ModelSize(
            hf_name="Qwen/Qwen3.5-9B",
            parameters=8_953_803_264,
            fields=shape(32, 4096, 12288, 16, groups=4, value_heads=32),
            full=Layout(gpus=8, tp=4),
            adapted=ADAPTED,
        ),
        "qwen35_text_27b": ModelSize(
            hf_name="Qwen/Qwen3.5-27B",
            parameters=26_895_998_464,
            fields=shape(64, 5120, 17408, 24, groups=4, value_heads=48),
            full=Layout(gpus=16, tp=8, pp=2),
            adapters=Layout(gpus=4, tp=4),
            adapted=ADAPTED,
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
