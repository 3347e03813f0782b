# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Save only plain data in the param groups.

`HybridDeviceOptimizer` puts its optimizer classes and its own options into every param group. They are pickled into the
checkpoint, which torch then refuses to read with `weights_only=True` (NVIDIA-NeMo/RL #1553).
"""

from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair


def _plain_param_groups(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class PlainParamGroups(base):
        def state_dict(self) -> dict[str, Any]:
            state_dict = super().state_dict()
            for group in state_dict["optimizer"]["param_groups"]:
                for key in [key for key, value in group.items() if isinstance(value, type)]:
                    del group[key]
            return state_dict

    return PlainParamGroups


def _groups_hold_classes(optimizer: DistributedOptimizer) -> bool:
    inner = optimizer.optimizer
    return isinstance(inner, HybridDeviceOptimizer) and any(
        isinstance(value, type) for value in inner.defaults.values()
    )


REPAIRS = (
    Repair(
        name="plain param groups",
        defect="saved param groups hold classes, which weights_only loading refuses",
        threads=("NVIDIA-NeMo/RL #1553",),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_plain_param_groups,
        is_needed=_groups_hold_classes,
    ),
)
