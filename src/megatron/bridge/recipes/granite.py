# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Granite 3.3."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(hidden: int, ffn: int, *, scores: float, logits: float) -> dict[str, Any]:
    return {
        "num_layers": 40,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": 32,
        "kv_channels": hidden // 32,
        "vocab_size": 49159,
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
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
