# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 7: functions that return a ready configuration, `<model>_{pretrain,sft,peft}_config`.

All names are known without importing torch; a recipe imports what it needs when it is called.
"""

import functools
import importlib
from typing import Any

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "gemma3",
    "gemma4",
    "glm4",
    "glm45",
    "gpt_oss",
    "granite",
    "granite4",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi4",
    "qwen2",
    "qwen3",
    "qwen35",
    "qwen35_moe",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm2",
    "smollm3",
)
"""Modules of this package with a `FAMILY` and its `RECIPES`, by name."""

OTHERS = ("gpt.vanilla_gpt",)
"""Modules with a `RECIPES` alone: models that nobody published weights of."""


@functools.cache
def all_recipes() -> dict[str, Any]:
    """Every recipe, by name."""
    modules = [importlib.import_module(f"{__name__}.{family}") for family in (*FAMILIES, *OTHERS)]
    return {name: recipe for module in modules for name, recipe in module.RECIPES.items()}


def find_recipe(name: str) -> Any:
    """The recipe of a name, or of `module:function` for one of your own.

    Raises:
        ValueError: There is none.
    """
    module, colon, function = name.partition(":")
    if colon:
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"recipe {name!r}: {error}; expected module:function on PYTHONPATH") from None
    recipes = all_recipes()
    if name not in recipes:
        import difflib

        close = difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(f"there is no recipe {name!r}: {hint}--list shows all {len(recipes)}")
    return recipes[name]


def __getattr__(name: str) -> Any:
    if not name.endswith("_config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return find_recipe(name)
    except ValueError as error:
        raise AttributeError(str(error)) from None


def __dir__() -> list[str]:
    return [*globals(), *all_recipes()]
