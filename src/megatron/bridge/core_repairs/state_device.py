# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Move loaded state to the device of its parameter.

Core tells sub-optimizers on the host from the one on the device by their class. Without Transformer Engine or Apex both
are torch's AdamW. After any load Core then moves the state of the part that stays on the device to the host.
"""

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of
from megatron.bridge.offload_engine.adam import FlatAdam


def _follow_the_parameter(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class FollowTheParameter(base):
        def _move_new_state_to_right_device(self) -> None:
            for optimizer in self.sub_optimizers:
                for param, state in optimizer.state.items():
                    for key, value in state.items():
                        # The step stays where it is: torch's Adam keeps it on the host.
                        if isinstance(value, torch.Tensor) and key != "step":
                            is_on_host = isinstance(optimizer, FlatAdam)  # and may be 16-bit there
                            state[key] = value.cpu() if is_on_host else value.to(param)

    return FollowTheParameter


def _classes_are_alike(optimizer: HybridDeviceOptimizer) -> bool:
    source = source_of(HybridDeviceOptimizer._move_new_state_to_right_device)
    goes_by_class = 'isinstance(optimizer, self.defaults["cpu_optimizer_cls"])' in source
    return goes_by_class and isinstance(optimizer.gpu_optimizer, optimizer.cpu_optimizer_cls)


REPAIRS = (
    Repair(
        name="state device",
        defect="after a load, the state of the part that stays on the device is moved to the host",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_follow_the_parameter,
        is_needed=_classes_are_alike,
    ),
)
