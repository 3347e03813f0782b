# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A repair of Megatron-Core's optimizers: what it mends, since when, and the override that does it."""

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
    """One defect of Core's and the mixin that overrides the methods it sits in."""

    name: str
    """Short name, for the log."""

    defect: str
    """What goes wrong without it, in one sentence."""

    threads: tuple[str, ...]
    """Public threads that report it; none where we found it first."""

    core_versions: str
    """Versions in which it was found."""

    target: type
    """Core's class that is overridden."""

    subclass: Callable[[type], type]
    """Makes, of `target` or a subclass of it, a subclass with the overrides. Adds no slots: instances change class."""

    is_needed: Callable[[Any], bool]
    """Whether this optimizer, in the installed Core, has the defect: asked of its source or state, not its version."""

    while_building: bool = False
    """Whether the constructor needs the overrides. Then Core is given the subclass to build, and `is_needed` is asked
    about a `ToBuild`."""


class ToBuild(NamedTuple):
    """What an optimizer is about to be built from."""

    config: OptimizerConfig
    model: list[Any]
    """This rank's chunks, wrapped in DDP."""

    def trains_fp32(self) -> bool:
        """Whether some trainable parameter is FP32."""
        params = (param for chunk in self.model for param in chunk.parameters())
        return any(param.requires_grad and param.dtype == torch.float32 for param in params)


def mixing_in(mixin: type) -> Callable[[type], type]:
    """A `Repair.subclass` that puts the overrides of `mixin`, a subclass of the target, before those of a class."""
    return lambda base: type(mixin.__name__, (mixin, base), {})


@functools.cache
def source_of(function: Callable) -> str:
    """A function's source, read once a process: it is asked for each optimizer that is built."""
    return inspect.getsource(function)


def stepping_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that take the steps: a hybrid's parts, or the optimizer itself."""
    return optimizer.sub_optimizers if isinstance(optimizer, HybridDeviceOptimizer) else [optimizer]


def steps_by_torch_adam_or_hybrid(distributed_optimizer: Any) -> bool:
    """Whether a distributed optimizer's inner one is torch's Adam or a hybrid, whose state Core doesn't restore."""
    return isinstance(distributed_optimizer.optimizer, (HybridDeviceOptimizer, torch.optim.Adam, torch.optim.AdamW))
