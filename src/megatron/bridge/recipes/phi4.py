# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Phi-4 and Phi-4-mini."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize

# fmt: off
_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]
# fmt: on


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int, **others: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": 128,
        **others,
    }


FAMILY = Family(
    provider="megatron.bridge.models.phi3.Phi3ModelProvider",
    sizes={
        "phi4_mini_3p8b": ModelSize(
            hf_name="microsoft/Phi-4-mini-instruct",
            parameters=3_836_021_760,
            fields=_shape(
                32,
                3072,
                8192,
                24,
                8,
                vocab_size=200064,
                share_embeddings_and_output_weights=True,
                rotary_percent=0.75,
                position_embedding_type="longrope",
                longrope_short_factor=[1.0] * 48,
                longrope_long_factor=_LONG,
                longrope_original_max_position_embeddings=4096,
                longrope_attention_factor=1.1902380714238083,
            ),
            full=Layout(gpus=2, tp=2),
        ),
        "phi4_14b": ModelSize(
            hf_name="microsoft/phi-4",
            parameters=14_659_507_200,
            fields=_shape(40, 5120, 17920, 40, 10, vocab_size=100352, seq_length=16384, rotary_base=250_000),
            full=Layout(gpus=8, tp=2, pp=2),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
