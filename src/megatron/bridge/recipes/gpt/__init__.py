# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the recipe of a plain GPT."""

from megatron.bridge.recipes.gpt.vanilla_gpt import RECIPES

globals().update(RECIPES)
