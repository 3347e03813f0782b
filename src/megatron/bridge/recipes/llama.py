# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Llama 3, 3.1 and 3.2."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize

__path__: list[str] = []  # a package to the import system: `llama.llama3` is a row of utils/moved_modules.py


def _shape(layers: int, hidden: int, ffn: int, heads: int, *, channels: int = 128, **others: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": 8,
        "kv_channels": channels,
        "vocab_size": 128256,
        "rotary_base": 500000.0,
        "layernorm_epsilon": 1e-5,
        **others,
    }


def _stretched(factor: float) -> dict[str, Any]:
    """Rotary frequencies for 131072 tokens: 3.1 and later. The other three numbers are the provider's defaults."""
    return {"rope_scaling": True, "rope_scaling_factor": factor}


_TIED = {"share_embeddings_and_output_weights": True}
_EIGHT_BILLION = _shape(32, 4096, 14336, 32)
_SEVENTY_BILLION = _shape(80, 8192, 28672, 64)

FAMILY = Family(
    provider="megatron.bridge.models.llama.LlamaModelProvider",
    sizes={
        "llama32_1b": ModelSize(
            hf_name="meta-llama/Llama-3.2-1B",
            parameters=1_235_814_400,
            fields=_shape(16, 2048, 8192, 32, channels=64, **_stretched(32.0), **_TIED),
        ),
        "llama32_3b": ModelSize(
            hf_name="meta-llama/Llama-3.2-3B",
            parameters=3_212_749_824,
            fields=_shape(28, 3072, 8192, 24, **_stretched(32.0), **_TIED),
        ),
        "llama3_8b": ModelSize(
            hf_name="meta-llama/Meta-Llama-3-8B",
            parameters=8_030_261_248,
            fields=_EIGHT_BILLION,
            full=Layout(gpus=4, tp=2),
        ),
        "llama31_8b": ModelSize(
            hf_name="meta-llama/Llama-3.1-8B",
            parameters=8_030_261_248,
            fields={**_EIGHT_BILLION, **_stretched(8.0)},
            full=Layout(gpus=4, tp=2),
        ),
        "llama3_70b": ModelSize(
            hf_name="meta-llama/Meta-Llama-3-70B",
            parameters=70_553_706_496,
            fields=_SEVENTY_BILLION,
            full=Layout(gpus=32, tp=8, pp=4),
            adapters=Layout(gpus=8, tp=8),
        ),
        "llama31_70b": ModelSize(
            hf_name="meta-llama/Llama-3.1-70B",
            parameters=70_553_706_496,
            fields={**_SEVENTY_BILLION, **_stretched(8.0)},
            full=Layout(gpus=32, tp=8, pp=4),
            adapters=Layout(gpus=8, tp=8),
        ),
        "llama31_405b": ModelSize(
            hf_name="meta-llama/Llama-3.1-405B",
            parameters=405_853_388_800,
            fields=_shape(126, 16384, 53248, 128, **_stretched(8.0)),
            full=Layout(gpus=128, tp=8, pp=16, counts_embeddings=True),
            adapters=Layout(gpus=32, tp=8, pp=4, counts_embeddings=True),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
