# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Install the repairs: the one place where Core's optimizers become ours.

Nothing is patched at import. An optimizer that has a defect is given a subclass of its own class with the overrides
that mend it; an optimizer without defects stays Core's.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron.bridge.training.cpu_offload import (
    exact_resume,
    load_template,
    master_lookup,
    one_master,
    plain_param_groups,
    state_device,
)
from megatron.bridge.training.cpu_offload.repair import Repair

logger = logging.getLogger(__name__)

REPAIRS: tuple[Repair, ...] = (
    *load_template.REPAIRS,
    *master_lookup.REPAIRS,
    *state_device.REPAIRS,
    *exact_resume.REPAIRS,
    *one_master.REPAIRS,
    *plain_param_groups.REPAIRS,
)


def install_repairs(optimizer: Any) -> list[str]:
    """Mend the distributed optimizers in an optimizer, at any depth of `ChainedOptimizer`.

    Args:
        optimizer: What `get_megatron_optimizer` returned.

    Returns:
        The names of the repairs in effect, in order, each once.
    """
    names: list[str] = []
    for distributed_optimizer in _distributed_optimizers(optimizer):
        if isinstance(distributed_optimizer.optimizer, HybridDeviceOptimizer):
            names += _repair(distributed_optimizer.optimizer, HybridDeviceOptimizer)
        names += _repair(distributed_optimizer, DistributedOptimizer)
    names = list(dict.fromkeys(names))
    if names:
        logger.info("repairs of megatron-core's optimizer in effect: %s", ", ".join(names))
    return names


def _distributed_optimizers(optimizer: Any) -> list[DistributedOptimizer]:
    if isinstance(optimizer, ChainedOptimizer):
        return [found for child in optimizer.chained_optimizers for found in _distributed_optimizers(child)]
    is_ours = isinstance(optimizer, DistributedOptimizer) and not optimizer.is_stub_optimizer
    return [optimizer] if is_ours else []


def _repair(optimizer: Any, target: type) -> list[str]:
    needed = tuple(repair for repair in REPAIRS if repair.target is target and repair.is_needed(optimizer))
    if needed and type(optimizer) is target:
        optimizer.__class__ = _repaired_class(target, tuple(repair.subclass for repair in needed))
    return [repair.name for repair in needed]


@functools.cache
def _repaired_class(target: type, subclasses: tuple[Callable[[type], type], ...]) -> type:
    return functools.reduce(lambda base, subclass: subclass(base), subclasses, target)
