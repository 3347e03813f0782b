# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""DeepSeek-V3, without the layer that predicts a further token, and those of its architecture: Moonlight and Kimi-K2.

Public as `megatron.bridge.recipes.moonlight`, too.
"""

from megatron.bridge.recipes.deepseek_v2 import (
    LATENT_QUERIES,
    WHOLE_QUERIES,
    latent_shape,
    latent_yarn,
    layered_experts,
)
from megatron.bridge.recipes.table import Family, Layout, ModelSize

FAMILY = Family(
    provider="megatron.bridge.models.deepseek_v3.DeepSeekV3ModelProvider",
    sizes={
        "moonlight_16b": ModelSize(
            hf_name="moonshotai/Moonlight-16B-A3B",
            parameters=15_960_110_208,
            fields={
                **latent_shape(
                    27, 2048, 11264, 16, vocabulary=163840, length=8192, q_lora_rank=None, layernorm_epsilon=1e-5
                ),
                **layered_experts(27, 64, 1408, shared=2, dense=1, topk=6, scale=2.446),
                "rotary_base": 50_000.0,
            },
            full=Layout(gpus=8, ep=8),
            adapted=WHOLE_QUERIES,
        ),
        "deepseek_v3": ModelSize(
            hf_name="deepseek-ai/DeepSeek-V3-Base",
            parameters=671_026_419_200,
            fields={
                **latent_shape(61, 7168, 18432, 128, vocabulary=129280, length=163840),
                **layered_experts(61, 256, 2048, shared=1, dense=3, topk=8, scale=2.5),
                **latent_yarn(40.0, weight=1.0),
                "moe_router_num_groups": 8,
                "moe_router_group_topk": 4,
            },
            full=Layout(gpus=288, tp=8, pp=9, ep=32, etp=1, counts_embeddings=True),
            adapters=Layout(gpus=32, tp=8, ep=32, etp=1),
            adapted=LATENT_QUERIES,
        ),
        "kimi_k2": ModelSize(
            hf_name="moonshotai/Kimi-K2-Base",
            parameters=1_026_408_232_448,
            fields={
                **latent_shape(61, 7168, 18432, 64, vocabulary=163840, length=131072),
                **layered_experts(61, 384, 2048, shared=1, dense=1, topk=8, scale=2.827),
                **latent_yarn(32.0, weight=1.0, beta_fast=1.0),
                "rotary_base": 50_000.0,
            },
            full=Layout(gpus=576, tp=8, pp=9, ep=64, etp=1, counts_embeddings=True),
            adapters=Layout(gpus=64, tp=8, ep=64, etp=1),
            adapted=LATENT_QUERIES,
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
