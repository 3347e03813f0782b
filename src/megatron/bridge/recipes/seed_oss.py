# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Seed-OSS, of which there is one size."""

from megatron.bridge.recipes.table import Family, Layout, ModelSize

FAMILY = Family(
    provider="megatron.bridge.models.seed_oss.SeedOSSModelProvider",
    sizes={
        "seed_oss_36b": ModelSize(
            hf_name="ByteDance-Seed/Seed-OSS-36B-Base",
            parameters=36_151_104_512,
            fields={
                "num_layers": 64,
                "hidden_size": 5120,
                "ffn_hidden_size": 27648,
                "num_attention_heads": 80,
                "vocab_size": 155136,
            },
            full=Layout(gpus=16, tp=8, pp=2),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
