# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Ministral 3, the language model."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(layers: int, hidden: int, ffn: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": 32,
        "vocab_size": 131072,
    }


FAMILY = Family(
    provider="megatron.bridge.models.ministral3.Ministral3ModelProvider",
    sizes={
        "ministral3_3b": ModelSize(
            hf_name="mistralai/Ministral-3-3B-Base-2512",
            parameters=3_429_006_336,
            fields={**_shape(26, 3072, 9216), "share_embeddings_and_output_weights": True},
            full=Layout(gpus=2, tp=2),
        ),
        "ministral3_8b": ModelSize(
            hf_name="mistralai/Ministral-3-8B-Base-2512",
            parameters=8_489_553_920,
            fields=_shape(34, 4096, 14336),
            full=Layout(gpus=4, tp=2),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
