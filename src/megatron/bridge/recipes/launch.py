# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A recipe by its name, as a function of plain texts: what a `run.Partial` carries to the workers."""

from collections.abc import Sequence

from megatron.bridge import recipes
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.utils.overrides import apply_overrides


def run_recipe(recipe: str, overrides: Sequence[str] = ()) -> None:
    """Finetune as a recipe says. Each rank calls it.

    Args:
        recipe: Name of a recipe, e.g. smollm2_135m_sft_config.
        overrides: Options that differ: ["train.train_iters=50"].

    Raises:
        AttributeError: There is no such recipe.
        ValueError: An override that doesn't fit; as for `finetune`.
    """
    finetune(apply_overrides(getattr(recipes, recipe)(), overrides), forward_step)
