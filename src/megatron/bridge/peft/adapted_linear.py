# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A linear layer of Core's that has an adapter: the layer itself, given a subclass of its own class.

Its weight keeps its name, so that checkpoints of the model without adapters fit; the adapter's parameters are named
`<layer>.adapter.<parameter>`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron.bridge.peft.grouped_experts import GroupedExpert
from megatron.bridge.peft.linear_layout import CoreLinear, is_grouped

_Linear: Any = object
"""The class that `AdaptedLinear` is put before: of Core's or of Transformer Engine's."""


class Adapted(_Linear):
    """Mark of modules that have an adapter. Stands before Core's class among the bases."""

    adapter: Any
    """The adapter."""

    def adapted_weights(self) -> "dict[str, AdaptedWeight]":
        """The weights that have an adapter, by their names in the module."""
        return {}


class AdaptedLinear(Adapted):
    """Mark of layers that have an adapter, and what they do with it.

    The adapter is called with the layer, its input and its output, and returns the output of both.
    """

    adapter_enabled: bool = True
    """Whether the adapter takes part in the forward pass."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Core's layer: (output, bias that is still to be added)."""
        output, bias = super().forward(x, *args, **kwargs)
        return (self.adapter(self, x, output) if self.adapter_enabled else output), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Core's, which takes every tensor for a whole one that it doesn't know, and the adapter's own in its place."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.update(self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata))
        return state

    def adapted_weights(self) -> "dict[str, AdaptedWeight]":
        """See `Adapted.adapted_weights`."""
        return {"weight": AdaptedWeight(self, self.adapter)}


class AdaptedGroupedLinear(AdaptedLinear):
    """The same for Transformer Engine's layer of all experts. Its adapter is a `GroupedAdapter`."""

    def forward(self, x: torch.Tensor, m_splits: Any) -> tuple[torch.Tensor, Any]:
        """As Core's layer: (output, biases that are still to be added)."""
        output, bias = super(AdaptedLinear, self).forward(x, m_splits)
        return (self.adapter(self, x, output, m_splits) if self.adapter_enabled else output), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Core's, and the adapters' beside it."""
        state = super(AdaptedLinear, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        state.update(self.adapter.sharded_state_dict_of(self, prefix, sharded_offsets, metadata))
        return state

    def adapted_weights(self) -> "dict[str, AdaptedWeight]":
        """See `Adapted.adapted_weights`."""
        return {
            f"weight{number}": AdaptedWeight(GroupedExpert(self, int(number)), adapter)
            for number, adapter in self.adapter.items()
        }


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight and the adapter beside it."""

    linear: CoreLinear
    """The layer that it is the weight of, or the expert."""
    adapter: torch.nn.Module

    def merged(self) -> torch.Tensor:
        """The weight that alone gives what layer and adapter give: this rank's part, in the weight's dtype."""
        adapter: Any = self.adapter
        return adapter.merged(self.linear)


def add_adapter(linear: CoreLinear, adapter: torch.nn.Module) -> None:
    """Give a linear layer an adapter, in place."""
    adapt(linear, AdaptedGroupedLinear if is_grouped(linear) else AdaptedLinear)
    linear.adapter = adapter


def adapt(module: Any, mark: type) -> None:
    """Give a module of Core's the subclass of its class that has a mark, in place."""
    module.__class__ = _adapted_class(module.__class__, mark)


def merge_adapters(chunks: list[torch.nn.Module]) -> int:
    """Add every adapter to the weight of its layer, in place, and remove it. Call on all ranks.

    Returns:
        How many layers had one.
    """
    adapted = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapted)]
    num_layers = sum(isinstance(module, AdaptedLinear) for module in adapted)
    for module in adapted:
        merge_adapter(module)
    return num_layers


@torch.no_grad()
def merge_adapter(module: Adapted) -> None:
    """Add the adapter to the weight of its layer, in place, and remove it. Call on all tensor-parallel ranks."""
    for adapted in module.adapted_weights().values():
        adapted.linear.weight.copy_(adapted.merged())
    del module.adapter
    module.__class__ = type(module).__bases__[1]


@functools.cache
def _adapted_class(base: type, mark: type) -> type:
    return type(f"Adapted{base.__name__}", (mark, base), {})
