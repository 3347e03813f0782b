# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""OLMo 3."""

import math
from typing import Any

from megatron.bridge.recipes.olmo2 import shape
from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        **shape(layers, hidden, ffn, heads, groups),
        "vocab_size": 100278,
        "window_size": (4095, 0),
        "window_attn_skip_freq": [int(layer % 4 != 0) for layer in range(1, layers + 1)],
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 8.0,
        "yarn_original_max_position_embeddings": 8192,
        "yarn_mscale": (1.2079441541679836 - 1) / (0.1 * math.log(8)),  # of the published attention_factor
        "yarn_mscale_all_dim": 0.0,
    }


FAMILY = Family(
    provider="megatron.bridge.models.olmo3.OLMo3ModelProvider",
    sizes={
        "olmo3_7b": ModelSize(
            hf_name="allenai/Olmo-3-1025-7B",
            parameters=7_298_011_136,
            fields=_shape(32, 4096, 11008, 32, 32),
            full=Layout(gpus=4, tp=2),
        ),
        "olmo3_32b": ModelSize(
            hf_name="allenai/Olmo-3-1125-32B",
            parameters=32_233_522_176,
            fields=_shape(64, 5120, 27648, 40, 8),
            full=Layout(gpus=16, tp=8, pp=2),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
