# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Granite 3.3."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def shape(
    hidden: int, ffn: int, *, scores: float, logits: float, heads: int = 32, vocabulary: int = 49159
) -> dict[str, Any]:
    """The fields of one size: its widths, its multipliers of scores and logits, its heads and its vocabulary."""
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
            fields=shape(2048, 8192, scores=0.015625, logits=8.0),
        ),
        "granite33_8b": ModelSize(
            hf_name="ibm-granite/granite-3.3-8b-instruct",
            parameters=8_170_864_640,
            fields=shape(4096, 12800, scores=0.0078125, logits=16.0),
            full=Layout(gpus=4, tp=2),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
