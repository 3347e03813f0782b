# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""OLMo 2."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def shape(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Any]:
    """The provider's fields of a size."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": hidden // heads,
        "vocab_size": 100352,
    }


FAMILY = Family(
    provider="megatron.bridge.models.olmo2.OLMo2ModelProvider",
    sizes={
        "olmo2_7b": ModelSize(
            hf_name="allenai/OLMo-2-1124-7B",
            parameters=7_298_617_344,
            fields=shape(32, 4096, 11008, 32, 32),
            full=Layout(gpus=4, tp=2),
        ),
        "olmo2_32b": ModelSize(
            hf_name="allenai/OLMo-2-0325-32B",
            parameters=32_234_279_936,
            fields=shape(64, 5120, 27648, 40, 8),
            full=Layout(gpus=16, tp=8, pp=2),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
