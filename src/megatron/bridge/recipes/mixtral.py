# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Mixtral 8x7B: 8 experts a layer, of which each token takes 2."""

from megatron.bridge.recipes.table import Family, Layout, ModelSize

FAMILY = Family(
    provider="megatron.bridge.models.mixtral.MixtralModelProvider",
    sizes={
        "mixtral_8x7b": ModelSize(
            hf_name="mistralai/Mixtral-8x7B-v0.1",
            parameters=46_702_792_704,
            fields={
                "num_layers": 32,
                "hidden_size": 4096,
                "ffn_hidden_size": 14336,
                "moe_ffn_hidden_size": 14336,
                "num_attention_heads": 32,
                "kv_channels": 128,
                "vocab_size": 32000,
                "moe_aux_loss_coeff": 0.02,
            },
            full=Layout(gpus=16, pp=2, ep=8),
            adapters=Layout(gpus=4, ep=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
