# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Qwen3-Next, without the layer that predicts a further token: attention in every fourth layer, else Gated DeltaNet."""

from megatron.bridge.recipes.table import Family, Layout, ModelSize

FAMILY = Family(
    provider="megatron.bridge.models.qwen3_next.Qwen3NextModelProvider",
    sizes={
        "qwen3_next_80b_a3b": ModelSize(
            hf_name="Qwen/Qwen3-Next-80B-A3B-Instruct",
            parameters=79_674_391_296,
            fields={
                "num_layers": 48,
                "hidden_size": 2048,
                "ffn_hidden_size": 5120,
                "num_attention_heads": 16,
                "num_query_groups": 2,
                "vocab_size": 151936,
                "moe_ffn_hidden_size": 512,
                "linear_attention_freq": [int((layer + 1) % 4 != 0) for layer in range(48)],
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
            },
            full=Layout(gpus=64, tp=4, pp=2, ep=32, etp=1),
            adapters=Layout(gpus=8, tp=2, ep=8, etp=1),
            adapted=("linear_qkv", "linear_proj", "in_proj", "out_proj"),
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
