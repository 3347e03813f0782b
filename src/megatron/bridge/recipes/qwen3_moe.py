# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Qwen3 with 128 experts a layer, of which each token takes 8."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _shape(layers: int, hidden: int, ffn: int, heads: int, *, expert_ffn: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "moe_ffn_hidden_size": expert_ffn,
        "num_attention_heads": heads,
        "num_query_groups": 4,
        "vocab_size": 151936,
        "layernorm_epsilon": 1e-6,
    }


FAMILY = Family(
    provider="megatron.bridge.models.qwen3_moe.Qwen3MoEModelProvider",
    sizes={
        "qwen3_30b_a3b": ModelSize(
            hf_name="Qwen/Qwen3-30B-A3B",
            parameters=30_532_122_624,
            fields=_shape(48, 2048, 6144, 32, expert_ffn=768),
            full=Layout(gpus=16, ep=8),
            adapters=Layout(gpus=4, ep=4),
        ),
        "qwen3_235b_a22b": ModelSize(
            hf_name="Qwen/Qwen3-235B-A22B",
            parameters=235_093_634_560,
            fields=_shape(94, 4096, 12288, 64, expert_ffn=1536),
            full=Layout(gpus=128, tp=4, pp=16, ep=8, etp=1, counts_embeddings=True),
            adapters=Layout(gpus=32, tp=4, pp=4, ep=8, etp=1, counts_embeddings=True),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
