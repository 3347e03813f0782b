# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The model families that can be converted, by their Hugging Face architecture.

A family is one file: how its Hugging Face configuration becomes provider fields, and a table of weight mappings. To
add one, write the file and name it here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron.bridge.models.conversion.mapping import WeightMapping

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

FAMILY_MODULES = {
    "LlamaForCausalLM": "megatron.bridge.models.llama",
}


@dataclass(frozen=True)
class ModelFamily:
    """Everything conversion knows about a family."""

    provider_class: "type[GPTModelProvider]"
    provider_fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Hugging Face configuration, as a dict -> fields of the provider; raises ValueError for what it can't express."""
    mappings: tuple[WeightMapping, ...]
    """Every weight that a model of the family may have; the built model says which ones it does."""
    ignored_tensors: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensors that files may hold and the model has no place for."""


def architecture_of(hf_config: Mapping[str, Any]) -> str | None:
    """The first supported architecture that a Hugging Face configuration names, or None."""
    return next((name for name in hf_config.get("architectures") or () if name in FAMILY_MODULES), None)


def family_of(hf_config: Mapping[str, Any]) -> ModelFamily:
    """The family of a Hugging Face configuration that `architecture_of` knows."""
    return import_module(FAMILY_MODULES[architecture_of(hf_config)]).FAMILY
