# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Install the repairs. This is the only place that changes Core's optimizers.

Nothing is patched at import. While Core builds the optimizer, it finds subclasses of its classes with the overrides
that a constructor needs. Afterwards the built optimizer gets a subclass of its own class with the overrides for the
defects that it has. An optimizer without defects keeps Core's class.
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
    *adam_kernel.REPAIRS,  # after exact_resume: it moves the step counter that exact_resume restores
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
"""(module of Core, class that it builds): the names that are replaced while Core builds the optimizer."""


@contextlib.contextmanager
def repaired_construction(config: core_optimizer.OptimizerConfig, model: list[Any]) -> Iterator[None]:
    """Within the context, `get_megatron_optimizer` builds optimizers with repaired constructors, where that is needed.

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
    """Repair a built optimizer and all optimizers inside it, at any depth of `ChainedOptimizer`.

    Args:
        optimizer: What `get_megatron_optimizer` returned.

    Returns:
        The names of the repairs in effect, each once, in the order of installation.
    """
    names = list(dict.fromkeys(name for part in _parts(optimizer) for name in _repair(part)))
    if names:
        logger.info("repairs of megatron-core's optimizer in effect: %s", ", ".join(names))
    return names


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers that may need a repair, innermost first. Stubs, which have no parameters, need none."""
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
    """A subclass of `base` with the overrides of `repairs`; `base` itself if there are none."""
    if not repairs:
        return base
    repaired: Any = functools.reduce(lambda repaired, repair: repair.subclass(repaired), repairs, base)
    repaired.repairs = (*getattr(base, "repairs", ()), *(repair.name for repair in repairs))
    return repaired
