# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`Repair`: one defect of Megatron-Core's optimizers, the versions that have it, and the override that repairs it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


@dataclass(frozen=True)
class Repair:
    """One defect of Core's, and the subclass that overrides the methods that have it."""

    name: str
    """Short name, for the log."""

    defect: str
    """What goes wrong without it, in one sentence."""

    threads: tuple[str, ...]
    """Public issues and pull requests that report it; empty if we know of none."""

    core_versions: str
    """Versions in which it was found."""

    target: type
    """The class of Core's that is overridden."""

    subclass: Callable[[type], type]
    """Makes a subclass with the overrides from `target` or a subclass of it. It must not add slots: built instances
    change their class to it."""

    is_needed: Callable[[Any], bool]
    """Whether an optimizer of the installed Core has the defect. Decided by Core's source or the optimizer's state, not
    by the version number, so that a fix of Core's switches the repair off."""

    while_building: bool = False
    """Whether the constructor already needs the overrides. Then Core builds the subclass, and `is_needed` gets a
    `ToBuild`."""


class ToBuild(NamedTuple):
    """The arguments from which Core is about to build an optimizer."""

    config: OptimizerConfig
    model: list[Any]
    """This rank's chunks, wrapped in DDP."""

    def trains_fp32(self) -> bool:
        """Whether some trainable parameter is FP32."""
        params = (param for chunk in self.model for param in chunk.parameters())
        return any(param.requires_grad and param.dtype == torch.float32 for param in params)


def mixing_in(mixin: type) -> Callable[[type], type]:
    """A `Repair.subclass` that puts the overrides of `mixin`, a subclass of the target, before those of its base."""
    return lambda base: type(mixin.__name__, (mixin, base), {})


@functools.cache
def source_of(function: Callable) -> str:
    """A function's source. Cached, since every optimizer that is built asks for it."""
    return inspect.getsource(function)


def stepping_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers that take the steps: a hybrid's sub-optimizers, or the optimizer itself."""
    return optimizer.sub_optimizers if isinstance(optimizer, HybridDeviceOptimizer) else [optimizer]


def steps_by_torch_adam_or_hybrid(distributed_optimizer: Any) -> bool:
    """Whether a distributed optimizer wraps torch's Adam or a hybrid, whose state Core doesn't restore."""
    return isinstance(distributed_optimizer.optimizer, (HybridDeviceOptimizer, torch.optim.Adam, torch.optim.AdamW))
