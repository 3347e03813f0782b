# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Mistral 7B v0.3, which has no sliding window; v0.1 has one, 32000 tokens and a rotary base of 10000."""

from megatron.bridge.recipes.table import Family, Layout, ModelSize

FAMILY = Family(
    provider="megatron.bridge.models.mistral.MistralModelProvider",
    sizes={
        "mistral_7b": ModelSize(
            hf_name="mistralai/Mistral-7B-v0.3",
            parameters=7_248_023_552,
            fields={
                "num_layers": 32,
                "hidden_size": 4096,
                "ffn_hidden_size": 14336,
                "num_attention_heads": 32,
                "kv_channels": 128,
                "vocab_size": 32768,
                "rotary_base": 1000000.0,
            },
            full=Layout(gpus=4, tp=2),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
