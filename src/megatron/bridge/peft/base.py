# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What every kind of adapter does to a model: freeze it, add the adapters, determine what is saved."""

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron.bridge.peft.adapted_linear import AdaptedLinear
from megatron.bridge.utils.names_over_ranks import name_over_all_ranks
from megatron.bridge.utils.section import Section

Model: TypeAlias = MegatronModule | list[MegatronModule]


@dataclass
class PEFT(Section, abc.ABC):
    """Parameter-efficient finetuning: called with a model, it freezes the weights and adds what is trained instead.

    A method of your own overrides `transform`.
    """

    params_to_save = frozenset[str]()
    """Names of the trainable parameters, as the unwrapped chunks name them; the call fills it."""

    module_names = frozenset[str]()
    """Whole names of this rank's modules, as `transform` gets them; the call fills it."""

    @abc.abstractmethod
    def transform(self, module: torch.nn.Module, name: str = "", prefix: str = "") -> torch.nn.Module:
        """Adapt one module, or return it as it is.

        Args:
            module: Any module of the model, each one once.
            name: Its last name, such as "linear_qkv".
            prefix: What comes before it, such as "decoder.layers.0.self_attention"; layers count from 0 over all
                pipeline stages, experts over all expert-parallel ranks.

        Returns:
            The module that takes its place.
        """

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Freeze a bare model and adapt it, in place. Before the precision and data-parallel wrappers.

        Args:
            model: This rank's chunks, or one.
            training: Whether the model will be trained; else it is put in evaluation mode.

        Returns:
            The same model.
        """
        self.check()
        self.freeze_model(model, training=training)
        names = set()
        for chunk in _chunks(model):
            # All names first: what an adapter adds is not adapted.
            for whole_name, module in list(chunk.named_modules()):
                as_all_name_it = name_over_all_ranks(chunk, whole_name)
                names.add(as_all_name_it)
                prefix, _, name = as_all_name_it.rpartition(".")
                adapted = self.transform(module, name=name, prefix=prefix)
                if adapted is not module:
                    place, _, own_name = whole_name.rpartition(".")
                    setattr(chunk.get_submodule(place), own_name, adapted)
        self.module_names = frozenset(names)
        self.set_params_to_save(model)
        return model

    def freeze_model(self, model: Model, *, training: bool = True) -> None:
        """Switch the gradients of all parameters off.

        Args:
            model: This rank's chunks, or one.
            training: As in the call.
        """
        for chunk in _chunks(model):
            chunk.requires_grad_(False)
            chunk.train(training)

    def set_params_to_save(self, model: Model) -> None:
        """Note the names of the trainable parameters."""
        self.params_to_save = frozenset(
            name for chunk in _chunks(model) for name, param in chunk.named_parameters() if param.requires_grad
        )

    def adapter_key_filter(self, key: str) -> bool:
        """Whether a checkpoint of the adapters holds this entry of the model's state."""
        return key in self.params_to_save

    def enable_adapter_layers(self, model: Model) -> None:
        """Let the adapters take part in the forward pass, as they do from the start."""
        _switch(model, enabled=True)

    def disable_adapter_layers(self, model: Model) -> None:
        """Leave the adapters out of the forward pass: the model gives what it gave before it was adapted."""
        _switch(model, enabled=False)

    @contextlib.contextmanager
    def disable_adapter(self, model: Model) -> Iterator[None]:
        """Inside, the model gives what it gave before it was adapted."""
        self.disable_adapter_layers(model)
        try:
            yield
        finally:
            self.enable_adapter_layers(model)

    def check(self) -> None:  # a method without options has nothing to check
        """Check the options, before anything is built.

        Raises:
            ValueError: Names the option.
        """


def _chunks(model: Any) -> list[MegatronModule]:
    return [unwrap_model(chunk) for chunk in (model if isinstance(model, list) else [model])]


def _switch(model: Model, *, enabled: bool) -> None:
    for chunk in _chunks(model):
        for module in chunk.modules():
            if isinstance(module, AdaptedLinear):
                module.adapter_enabled = enabled
