# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Qwen3.5 with 256 experts a layer, of which each token takes 8 and a shared one; its language model."""

from typing import Any

from megatron.bridge.recipes.qwen35 import ADAPTED, shape
from megatron.bridge.recipes.table import Family, Layout, ModelSize


def _experts(width: int) -> dict[str, Any]:
    return {"moe_ffn_hidden_size": width, "moe_shared_expert_intermediate_size": width}


FAMILY = Family(
    provider="megatron.bridge.models.qwen3_5_moe.Qwen35MoEModelProvider",
    sizes={
        "qwen35_text_35b_a3b": ModelSize(
            hf_name="Qwen/Qwen3.5-35B-A3B",
            parameters=34_660_610_688,
            fields={**shape(40, 2048, 512, 16, groups=2, value_heads=32), **_experts(512)},
            full=Layout(gpus=32, tp=2, ep=16, etp=1),
            adapters=Layout(gpus=4, tp=2, ep=4, etp=1),
            adapted=ADAPTED,
        ),
        "qwen35_text_122b_a10b": ModelSize(
            hf_name="Qwen/Qwen3.5-122B-A10B",
            parameters=122_111_526_912,
            fields={**shape(48, 3072, 1024, 32, groups=2, value_heads=64), **_experts(1024)},
            full=Layout(gpus=64, tp=8, pp=2, ep=32, etp=1),
            adapters=Layout(gpus=8, tp=4, ep=8, etp=1),
            adapted=ADAPTED,
        ),
    },
)
RECIPES = FAMILY.recipes(__name__)
globals().update(RECIPES)
