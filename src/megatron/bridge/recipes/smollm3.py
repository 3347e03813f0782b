# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""SmolLM3, of which there is one size."""

from megatron.bridge.recipes.table import Family, Layout, ModelSize

FAMILY = Family(
    provider="megatron.bridge.models.smollm3.SmolLM3ModelProvider",
    sizes={
        "smollm3_3b": ModelSize(
            hf_name="HuggingFaceTB/SmolLM3-3B",
            parameters=3_075_098_624,
            fields={
                "num_layers": 36,
                "hidden_size": 2048,
                "ffn_hidden_size": 11008,
                "num_attention_heads": 16,
                "kv_channels": 128,
                "vocab_size": 128256,
                "no_rope_freq": [int(layer % 4 == 0) for layer in range(1, 37)],
            },
            full=Layout(gpus=2, tp=2),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
