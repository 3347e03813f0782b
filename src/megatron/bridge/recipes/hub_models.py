# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Recipes and the models on the Hugging Face hub that they are for."""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

logger = logging.getLogger(__name__)

_VARIANTS = ("-instruct", "-thinking", "-chat", "-it", "-base", "-pt")
"""Ends of the names, in lower case, of models with the same sizes."""


def cached_provider(hf_name: str) -> "GPTModelProvider | None":
    """The model as its `config.json` in the hub's cache says. Nothing is fetched.

    Returns:
        None where it isn't cached.

    Raises:
        ValueError: The cached configuration is damaged, or can't be expressed.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    try:
        bridge = AutoBridge.from_hf_pretrained(hf_name, local_files_only=True)
    except FileNotFoundError:
        logger.debug("%s isn't in the hub's cache: the sizes are the recipe's own", hf_name)
        return None
    return bridge.to_megatron_provider(load_weights=False)


def is_model_name(recipe: str) -> bool:
    """Whether what stands in a recipe's place is a model's name on the hub, such as `Qwen/Qwen3-0.6B`."""
    return "/" in recipe and ":" not in recipe


def size_for(hf_name: str) -> str:
    """The first part of the name of the recipes for a model on the hub, such as `qwen3_600m`.

    Raises:
        ValueError: No recipe is for it.
    """
    from megatron.bridge.recipes import FAMILIES

    families = [importlib.import_module(f"{__package__}.{module}").FAMILY for module in FAMILIES]
    sizes = {_without_variant(size.hf_name): key for family in families for key, size in family.sizes.items()}
    found = sizes.get(_without_variant(hf_name))
    if found is None:
        raise ValueError(
            f"no recipe is for {hf_name!r}: name the recipe of a similar model, and add --hf-path {hf_name} (--list "
            "shows all recipes)"
        )
    return found


def _without_variant(hf_name: str) -> str:
    name = hf_name.lower()
    return name.removesuffix(next((end for end in _VARIANTS if name.endswith(end)), ""))
