# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Qwen3 without experts."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize

_TIED = {"share_embeddings_and_output_weights": True}


def _shape(layers: int, hidden: int, ffn: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": 8,
        "vocab_size": 151936,
        "layernorm_epsilon": 1e-6,
        **others,
    }


FAMILY = Family(
    provider="megatron.bridge.models.qwen3.Qwen3ModelProvider",
    sizes={
        "qwen3_600m": ModelSize(
            hf_name="Qwen/Qwen3-0.6B", parameters=596_049_920, fields=_shape(28, 1024, 3072, 16, **_TIED)
        ),
        "qwen3_1p7b": ModelSize(
            hf_name="Qwen/Qwen3-1.7B", parameters=1_720_574_976, fields=_shape(28, 2048, 6144, 16, **_TIED)
        ),
        "qwen3_4b": ModelSize(
            hf_name="Qwen/Qwen3-4B",
            parameters=4_022_468_096,
            fields=_shape(36, 2560, 9728, 32, **_TIED),
            full=Layout(gpus=2, tp=2),
        ),
        "qwen3_8b": ModelSize(
            hf_name="Qwen/Qwen3-8B",
            parameters=8_190_735_360,
            fields=_shape(36, 4096, 12288, 32),
            full=Layout(gpus=4, tp=2),
        ),
        "qwen3_14b": ModelSize(
            hf_name="Qwen/Qwen3-14B",
            parameters=14_768_307_200,
            fields=_shape(40, 5120, 17408, 40),
            full=Layout(gpus=8, tp=4),
        ),
        "qwen3_32b": ModelSize(
            hf_name="Qwen/Qwen3-32B",
            parameters=32_762_123_264,
            fields=_shape(64, 5120, 25600, 64),
            full=Layout(gpus=16, tp=8, pp=2),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
