# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gemma 3; of the sizes that take images, the language model."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize

__path__: list[str] = []  # a package to the import system: `gemma.gemma3` is a row of utils/moved_modules.py


def _shape(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, *, window: int, **others: Any
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(layer % 6 != 0) for layer in range(1, layers + 1)],
        **others,
    }


_IMAGES: dict[str, Any] = {"vocab_size": 262208, "window": 1024, "seq_len_interpolation_factor": 8.0}

FAMILY = Family(
    provider="megatron.bridge.models.gemma3.Gemma3ModelProvider",
    sizes={
        "gemma3_1b": ModelSize(
            hf_name="google/gemma-3-1b-pt",
            parameters=999_885_952,
            fields=_shape(26, 1152, 6912, 4, 1, vocab_size=262144, window=512, seq_length=32768),
        ),
        "gemma3_4b": ModelSize(
            hf_name="google/gemma-3-4b-pt",
            parameters=3_880_263_168,
            fields=_shape(34, 2560, 10240, 8, 4, **_IMAGES),
            full=Layout(gpus=2, tp=2),
        ),
        "gemma3_12b": ModelSize(
            hf_name="google/gemma-3-12b-pt",
            parameters=11_766_034_176,
            fields=_shape(48, 3840, 15360, 16, 8, **_IMAGES),
            full=Layout(gpus=8, tp=4),
        ),
        "gemma3_27b": ModelSize(
            hf_name="google/gemma-3-27b-pt",
            parameters=27_009_346_304,
            fields=_shape(62, 5376, 21504, 32, 16, **_IMAGES, kv_channels=128, softmax_scale=168**-0.5),
            full=Layout(gpus=16, tp=8),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
