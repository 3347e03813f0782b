# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Install the repairs: the one place where Core's optimizers become ours.

Nothing is patched at import. While Core builds the optimizer, it is handed a subclass of its distributed optimizer
with the overrides that the constructor needs; the built optimizer is then given a subclass of its own class with the
overrides that mend the defects it has. An optimizer without defects stays Core's.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import megatron.core.optimizer as core_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron.bridge.core_repairs import (
    adam_kernel,
    duplicate_master,
    empty_bucket,
    empty_shard,
    exact_resume,
    finite_gradients,
    gradient_wait,
    group_order,
    lazy_hybrid_init,
    load_template,
    master_lookup,
    native_fp32,
    offload_step,
    plain_param_groups,
    plain_state,
    reshardable_state,
    state_device,
    step_counter,
)
from megatron.bridge.core_repairs.repair import Repair, ToBuild
from megatron.bridge.utils.replaced import replaced

logger = logging.getLogger(__name__)

REPAIRS: tuple[Repair, ...] = (
    *empty_shard.REPAIRS,
    *empty_bucket.REPAIRS,
    *load_template.REPAIRS,
    *master_lookup.REPAIRS,
    *state_device.REPAIRS,
    *step_counter.REPAIRS,
    *gradient_wait.REPAIRS,
    *exact_resume.REPAIRS,
    *adam_kernel.REPAIRS,  # after what restores the step counter
    *duplicate_master.REPAIRS,
    *plain_param_groups.REPAIRS,
    *plain_state.REPAIRS,
    *native_fp32.REPAIRS,
    *group_order.REPAIRS,
    *reshardable_state.REPAIRS,
    *offload_step.REPAIRS,
    *lazy_hybrid_init.REPAIRS,
    *finite_gradients.REPAIRS,
)

BUILT = (
    (core_optimizer, DistributedOptimizer),
    (core_optimizer, HybridDeviceOptimizer),
    (distrib_optimizer, HybridDeviceOptimizer),
)
"""The modules of Core that build optimizers, each with a class that it finds there."""


@contextlib.contextmanager
def repaired_construction(config: core_optimizer.OptimizerConfig, model: list[Any]) -> Iterator[None]:
    """Inside, `get_megatron_optimizer` builds optimizers whose constructors are mended, where they must be.

    Args:
        config: The optimizer's configuration.
        model: This rank's chunks, wrapped in DDP.
    """
    to_build = ToBuild(config, model)
    needed = [repair for repair in REPAIRS if repair.while_building and repair.is_needed(to_build)]
    with contextlib.ExitStack() as stack:
        for module, built in BUILT:
            of_class = tuple(repair for repair in needed if repair.target is built)
            stack.enter_context(replaced(module, **{built.__name__: _repaired_class(built, of_class)}))
        yield


def install_repairs(optimizer: Any) -> list[str]:
    """Mend an optimizer and all that it is made of, at any depth of `ChainedOptimizer`.

    Args:
        optimizer: What `get_megatron_optimizer` returned.

    Returns:
        The names of the repairs in effect, in order, each once.
    """
    names = list(dict.fromkeys(name for part in _parts(optimizer) for name in _repair(part)))
    if names:
        logger.info("repairs of megatron-core's optimizer in effect: %s", ", ".join(names))
    return names


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers that may need a repair, inner ones first; one without parameters has nothing to mend."""
    if isinstance(optimizer, ChainedOptimizer):
        for child in optimizer.chained_optimizers:
            yield from _parts(child)
        yield optimizer
    elif isinstance(optimizer, MegatronOptimizer) and not optimizer.is_stub_optimizer:
        if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
            yield optimizer.optimizer
        yield optimizer


def _repair(optimizer: Any) -> list[str]:
    needed = tuple(
        repair
        for repair in REPAIRS
        if isinstance(optimizer, repair.target) and not repair.while_building and repair.is_needed(optimizer)
    )
    in_effect = getattr(type(optimizer), "repairs", ())
    missing = tuple(repair for repair in needed if repair.name not in in_effect)
    optimizer.__class__ = _repaired_class(optimizer.__class__, missing)
    return [*in_effect, *(repair.name for repair in missing)]


@functools.cache
def _repaired_class(base: type, repairs: tuple[Repair, ...]) -> type:
    """`base` with the repairs' overrides; `base` itself where there are none."""
    if not repairs:
        return base
    repaired: Any = functools.reduce(lambda mended, repair: repair.subclass(mended), repairs, base)
    repaired.repairs = (*getattr(base, "repairs", ()), *(repair.name for repair in repairs))
    return repaired
