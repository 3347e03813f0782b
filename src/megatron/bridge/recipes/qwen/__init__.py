# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of Qwen's recipes: those of its families, which are found below it too."""

from megatron.bridge.recipes import qwen2, qwen3, qwen3_moe, qwen3_next

RECIPES = {**qwen2.RECIPES, **qwen3.RECIPES, **qwen3_moe.RECIPES, **qwen3_next.RECIPES}
globals().update(RECIPES)
