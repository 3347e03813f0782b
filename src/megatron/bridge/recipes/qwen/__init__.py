# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of Qwen's recipes: those of its families, which are found below it too."""

from megatron.bridge.recipes import qwen2, qwen3, qwen3_moe, qwen3_next, qwen35, qwen35_moe

RECIPES = {
    name: recipe
    for family in (qwen2, qwen3, qwen3_moe, qwen3_next, qwen35, qwen35_moe)
    for name, recipe in family.RECIPES.items()
}
globals().update(RECIPES)
