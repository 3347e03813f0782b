# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Qwen2.5. The larger base models have a norm epsilon of 1e-5; their instructed ones have the smaller ones' 1e-6."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize

_TIED = {"share_embeddings_and_output_weights": True, "vocab_size": 151936}
_UNTIED = {"share_embeddings_and_output_weights": False, "vocab_size": 152064}


def _shape(layers: int, hidden: int, ffn: int, heads: int, *, groups: int, **others: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": hidden // heads,
        "layernorm_epsilon": 1e-6,
        **others,
    }


FAMILY = Family(
    provider="megatron.bridge.models.qwen2.Qwen2ModelProvider",
    sizes={
        "qwen25_500m": ModelSize(
            hf_name="Qwen/Qwen2.5-0.5B", parameters=494_032_768, fields=_shape(24, 896, 4864, 14, groups=2, **_TIED)
        ),
        "qwen25_1p5b": ModelSize(
            hf_name="Qwen/Qwen2.5-1.5B", parameters=1_543_714_304, fields=_shape(28, 1536, 8960, 12, groups=2, **_TIED)
        ),
        "qwen25_7b": ModelSize(
            hf_name="Qwen/Qwen2.5-7B",
            parameters=7_615_616_512,
            fields=_shape(28, 3584, 18944, 28, groups=4, **_UNTIED),
            full=Layout(gpus=4, tp=2),
        ),
        "qwen25_14b": ModelSize(
            hf_name="Qwen/Qwen2.5-14B",
            parameters=14_770_033_664,
            fields=_shape(48, 5120, 13824, 40, groups=8, layernorm_epsilon=1e-5, **_UNTIED),
            full=Layout(gpus=8, tp=4),
        ),
        "qwen25_32b": ModelSize(
            hf_name="Qwen/Qwen2.5-32B",
            parameters=32_763_876_352,
            fields=_shape(64, 5120, 27648, 40, groups=8, layernorm_epsilon=1e-5, **_UNTIED),
            full=Layout(gpus=16, tp=8, pp=2),
            adapters=Layout(gpus=4, tp=4),
        ),
        "qwen25_72b": ModelSize(
            hf_name="Qwen/Qwen2.5-72B",
            parameters=72_706_203_648,
            fields=_shape(80, 8192, 29568, 64, groups=8, layernorm_epsilon=1e-5, **_UNTIED),
            full=Layout(gpus=32, tp=8, pp=4),
            adapters=Layout(gpus=8, tp=8),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
