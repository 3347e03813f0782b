# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""GPT-OSS, of whose experts each token takes 4."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(layers: int, *, experts: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": 2880,
        "ffn_hidden_size": 2880,
        "moe_ffn_hidden_size": 2880,
        "num_attention_heads": 64,
        "num_moe_experts": experts,
        "vocab_size": 201_088,
        "window_size": (127, 0),
        "window_attn_skip_freq": [(layer + 1) % 2 for layer in range(layers)],
    }


FAMILY = Family(
    provider="megatron.bridge.models.gpt_oss.GPTOSSModelProvider",
    sizes={
        "gpt_oss_20b": ModelSize(
            hf_name="openai/gpt-oss-20b",
            parameters=20_914_757_184,
            fields=_shape(24, experts=32),
            full=Layout(gpus=8, ep=8),
            adapters=Layout(gpus=2, ep=2),
        ),
        "gpt_oss_120b": ModelSize(
            hf_name="openai/gpt-oss-120b",
            parameters=116_829_156_672,
            fields=_shape(36, experts=128),
            full=Layout(gpus=64, pp=4, ep=16),
            adapters=Layout(gpus=8, ep=8),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
