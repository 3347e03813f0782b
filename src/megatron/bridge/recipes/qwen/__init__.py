# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of Qwen's recipes: those of `qwen2`, `qwen3` and `qwen3_moe`, which are found below it too."""

from megatron.bridge.recipes import qwen2, qwen3, qwen3_moe

RECIPES = {**qwen2.RECIPES, **qwen3.RECIPES, **qwen3_moe.RECIPES}
globals().update(RECIPES)
