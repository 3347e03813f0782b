# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gemma 4's dense size, whose language model has neither experts nor embeddings for each layer."""

from megatron.bridge.recipes.table import Family, Layout, ModelSize

_LAYERS = 60

FAMILY = Family(
    provider="megatron.bridge.models.gemma4.Gemma4ModelProvider",
    sizes={
        "gemma4_31b": ModelSize(
            hf_name="google/gemma-4-31B",
            parameters=30_697_345_340,
            fields={
                "num_layers": _LAYERS,
                "hidden_size": 5376,
                "ffn_hidden_size": 21504,
                "num_attention_heads": 32,
                "num_query_groups": 16,
                "num_global_query_groups": 4,
                "vocab_size": 262144,
                "seq_length": 262144,
                "window_size": (1023, 0),
                "window_attn_skip_freq": [int(layer % 6 != 0) for layer in range(1, _LAYERS + 1)],
            },
            full=Layout(gpus=16, tp=8),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
