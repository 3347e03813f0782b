# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Granite 4's dense sizes."""

from megatron.bridge.recipes.granite import shape
from megatron.bridge.recipes.table import Family, Layout, ModelSize

FAMILY = Family(
    provider="megatron.bridge.models.granite4.Granite4ModelProvider",
    sizes={
        "granite4_1b": ModelSize(
            hf_name="ibm-granite/granite-4.0-1b",
            parameters=1_631_750_144,
            fields={
                **shape(2048, 4096, scores=0.0078125, logits=8.0, heads=16, vocabulary=100352),
                "num_query_groups": 4,
            },
        ),
        "granite4_micro_3b": ModelSize(
            hf_name="ibm-granite/granite-4.0-micro",
            parameters=3_402_836_480,
            fields=shape(2560, 8192, scores=0.015625, logits=10.0, heads=40, vocabulary=100352),
            full=Layout(gpus=2, tp=2),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
