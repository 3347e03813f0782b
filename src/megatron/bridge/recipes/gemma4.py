# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gemma 4, as language models."""

from typing import Any

from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _sizes(layers: int, *, sliding: int) -> dict[str, Any]:
    """The layers, of which so many have a sliding window before each that has none."""
    slides = [int(layer % (sliding + 1) != 0) for layer in range(1, layers + 1)]
    return {"num_layers": layers, "window_attn_skip_freq": slides, "vocab_size": 262144}


_SMALL = {
    "num_attention_heads": 8,
    "seq_length": 131072,
    "window_size": (511, 0),
    "values_are_keys": False,
    "hidden_size_per_layer_input": 256,
}
"""Of those with inputs of each layer's own, most of whose parameters are a table of these."""

FAMILY = Family(
    provider="megatron.bridge.models.gemma4.Gemma4ModelProvider",
    sizes={
        "gemma4_e2b": ModelSize(
            hf_name="google/gemma-4-E2B",
            parameters=4_628_569_379,
            fields={
                **_sizes(35, sliding=4),
                **_SMALL,
                "hidden_size": 1536,
                "ffn_hidden_size": 6144,
                "num_query_groups": 1,
                "num_kv_shared_layers": 20,
                "use_double_wide_mlp": True,
            },
            full=Layout(gpus=2, tp=2),
            adapters=Layout(),
        ),
        "gemma4_e4b": ModelSize(
            hf_name="google/gemma-4-E4B",
            parameters=7_463_013_418,
            fields={
                **_sizes(42, sliding=5),
                **_SMALL,
                "hidden_size": 2560,
                "ffn_hidden_size": 10240,
                "num_query_groups": 2,
                "num_kv_shared_layers": 18,
            },
            full=Layout(gpus=4, tp=2),
            adapters=Layout(),
        ),
        "gemma4_26b_a4b": ModelSize(
            hf_name="google/gemma-4-26B-A4B",
            parameters=25_233_141_790,
            fields={
                **_sizes(30, sliding=5),
                "hidden_size": 2816,
                "ffn_hidden_size": 2112,
                "num_attention_heads": 16,
                "num_query_groups": 8,
                "num_global_query_groups": 2,
                "seq_length": 262144,
                "window_size": (1023, 0),
                "num_moe_experts": 128,
                "moe_router_topk": 8,
                "moe_ffn_hidden_size": 704,
                "moe_shared_expert_intermediate_size": 2112,
                "moe_grouped_gemm": True,
            },
            full=Layout(gpus=16, ep=8),
            adapters=Layout(gpus=4, ep=4),
        ),
        "gemma4_31b": ModelSize(
            hf_name="google/gemma-4-31B",
            parameters=30_697_345_340,
            fields={
                **_sizes(60, sliding=5),
                "hidden_size": 5376,
                "ffn_hidden_size": 21504,
                "num_attention_heads": 32,
                "num_query_groups": 16,
                "num_global_query_groups": 4,
                "seq_length": 262144,
                "window_size": (1023, 0),
            },
            full=Layout(gpus=16, tp=8),
            adapters=Layout(gpus=4, tp=4),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
