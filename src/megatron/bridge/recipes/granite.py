# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Granite 3.3, and Granite 4's dense sizes."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(
    hidden: int, ffn: int, *, scores: float, logits: float, heads: int = 32, vocabulary: int = 49159
) -> dict[str, Any]:
    return {
        "num_layers": 40,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "vocab_size": vocabulary,
        "softmax_scale": scores,
        "logits_scaling": logits,
    }


FAMILY = Family(
    provider="megatron.bridge.models.granite.GraniteModelProvider",
    sizes={
        "granite33_2b": ModelSize(
            hf_name="ibm-granite/granite-3.3-2b-instruct",
            parameters=2_533_539_840,
            fields=_shape(2048, 8192, scores=0.015625, logits=8.0),
        ),
        "granite33_8b": ModelSize(
            hf_name="ibm-granite/granite-3.3-8b-instruct",
            parameters=8_170_864_640,
            fields=_shape(4096, 12800, scores=0.0078125, logits=16.0),
            full=Layout(gpus=4, tp=2),
        ),
        "granite4_1b": ModelSize(
            hf_name="ibm-granite/granite-4.0-1b",
            parameters=1_631_750_144,
            fields={
                **_shape(2048, 4096, scores=0.0078125, logits=8.0, heads=16, vocabulary=100352),
                "num_query_groups": 4,
            },
        ),
        "granite4_micro_3b": ModelSize(
            hf_name="ibm-granite/granite-4.0-micro",
            parameters=3_402_836_480,
            fields=_shape(2560, 8192, scores=0.015625, logits=10.0, heads=40, vocabulary=100352),
            full=Layout(gpus=2, tp=2),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
