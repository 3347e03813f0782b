# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A family of recipes as a table with a row for each size, which gives three recipes.

Nothing heavy is imported before a recipe is called, so that listing all names is fast.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES

if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.config import ConfigContainer

Recipe = Callable[..., "ConfigContainer"]
"""A function that returns a ready configuration; one for adapters takes `peft_scheme`."""

_FIELDS = {short.lower(): PARALLEL_SIZES[short].field for short in ("TP", "PP", "CP", "EP", "ETP")}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel sizes of a recipe, and the number of devices that it is meant for."""

    gpus: int = 1
    """Smallest number of devices of 80 GB. A multiple of it adds data parallelism."""
    tp: int = 1
    """Ranks that share each matrix."""
    pp: int = 1
    """Ranks that share the layers."""
    cp: int = 1
    """Ranks that share each sequence."""
    ep: int = 1
    """Ranks that share the experts."""
    etp: int | None = None
    """Ranks that share each expert's matrices; None: as the provider says, which is mostly TP."""
    counts_embeddings: bool = False
    """Whether embedding and output layer count as a layer each when layers are dealt to stages."""

    def fields(self) -> dict[str, Any]:
        """The provider's fields."""
        sizes = {name: getattr(self, axis) for axis, name in _FIELDS.items()}
        fields: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        fields["sequence_parallel"] = self.tp > 1
        if self.counts_embeddings:
            fields["account_for_embedding_in_pipeline_split"] = True
            fields["account_for_loss_in_pipeline_split"] = True
        return fields

    def __str__(self) -> str:
        """Such as `TP 8, PP 4`."""
        sizes = {axis.upper(): getattr(self, axis) for axis in _FIELDS}
        return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (None, 1)) or "one device"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """One published model."""

    hf_name: str
    """Its name on the Hugging Face hub, from which a run takes the tokenizer unless it names another."""
    parameters: int
    """Published number of parameters."""
    fields: Mapping[str, Any]
    """Fields of the provider that differ from the defaults of its class."""
    full: Layout = field(default_factory=Layout)
    """Layout for training all weights."""
    adapters: Layout = field(default_factory=Layout)
    """Layout for training adapters."""
    adapted: tuple[str, ...] = ()
    """What adapters are put beside, in LoRA's names. Empty: its default targets."""


@dataclass(frozen=True)
class Family:
    """A table of sizes of one provider class."""

    provider: str
    """The provider's class, as `module.Class`."""
    sizes: Mapping[str, ModelSize]
    """The sizes, by the first part of the recipe's name."""

    def build_provider(self, size: str, layout: Layout) -> "GPTModelProvider":
        """The model of a size, shared by ranks as a layout says.

        It is what the hub's `config.json` says if that is in the hub's cache, else what the table says. Nothing is
        fetched.
        """
        from megatron.bridge.models.conversion.hf_config import vocabulary_fields
        from megatron.bridge.recipes.hub_models import cached_provider

        cached = cached_provider(self.sizes[size].hf_name)
        if cached is not None:
            for name, value in layout.fields().items():
                setattr(cached, name, value)
            return cached
        module, _, name = self.provider.rpartition(".")
        fields = self.sizes[size].fields
        provider_class = getattr(importlib.import_module(module), name)
        return provider_class(**vocabulary_fields(fields["vocab_size"]), **fields, **layout.fields())

    def pretrain(self, size: str) -> "ConfigContainer":
        """Train all weights from random initialisation, on Core's mock data."""
        from megatron.bridge.recipes.common import pretrain_common

        return pretrain_common(self.build_provider(size, self.sizes[size].full), seq_length=4096)

    def sft(self, size: str) -> "ConfigContainer":
        """Train all weights, starting from pretrained ones."""
        from megatron.bridge.recipes.common import sft_common

        cfg = sft_common(self.build_provider(size, self.sizes[size].full), seq_length=2048)
        cfg.tokenizer.tokenizer_model = self.sizes[size].hf_name
        return cfg

    def peft(self, size: str, peft_scheme: "str | PEFT" = "lora") -> "ConfigContainer":
        """Train adapters beside frozen pretrained weights."""
        from megatron.bridge.recipes.common import name_targets, peft_common

        provider = self.build_provider(size, self.sizes[size].adapters)
        cfg = peft_common(provider, seq_length=2048, peft_scheme=peft_scheme)
        if self.sizes[size].adapted and isinstance(peft_scheme, str):
            name_targets(cfg.peft, self.sizes[size].adapted)
        cfg.tokenizer.tokenizer_model = self.sizes[size].hf_name
        return cfg

    def recipes(self, module: str) -> dict[str, Recipe]:
        """`<size>_{pretrain,sft,peft}_config` for every size, to be put into the namespace of `module`."""
        found: dict[str, Recipe] = {}
        for size in self.sizes:
            for build in (self.pretrain, self.sft, self.peft):
                recipe = _bound(build, size, module)
                found[recipe.__name__] = recipe
        return found


def _bound(build: Recipe, size: str, module: str) -> Recipe:
    """A function of `module` that builds one size, with its own name and docstring."""
    mode = build.__name__

    def build_size(*args: Any, **kwargs: Any) -> "ConfigContainer":
        return build(size, *args, **kwargs)

    recipe: Any = build_size
    recipe.__module__, recipe.__name__, recipe.__qualname__ = module, *2 * (f"{size}_{mode}_config",)
    recipe.__doc__ = f"{size}, {mode}: {build.__doc__}"
    signature = inspect.signature(build)
    recipe.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return recipe
