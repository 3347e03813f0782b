# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Let the sub-optimizer on the device wait for its gradients.

With overlap and in precision-aware mode, Core casts the 16-bit gradients of the parameters that stay on the device to
FP32. It does so on the stream that copies gradients to the host. The sub-optimizer on the device steps on the current
stream, which doesn't wait for that one: it may read gradients that are not written yet (NVIDIA/Megatron-LM PR 7449).
In default mode nothing is cast there, so nothing needs to wait.
"""

from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of
from megatron.bridge.utils.device import wait_for_stream


def _gradient_wait(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class GradientWait(base):
        def step(self, closure: Any = None) -> None:
            if self.gpu_optimizer is None:
                return super().step(closure)
            # Registered for this step only: a load makes Core build the sub-optimizers again.
            hook = self.gpu_optimizer.register_step_pre_hook(lambda *_: wait_for_stream(self._d2h_stream))
            try:
                return super().step(closure)
            finally:
                hook.remove()

    return GradientWait


def _steps_without_waiting(optimizer: HybridDeviceOptimizer) -> bool:
    is_precision_aware = bool(optimizer.param_to_fp32_param)
    if not (optimizer.overlap_cpu_optimizer_d2h_h2d and is_precision_aware and optimizer.gpu_optimizer):
        return False
    source = source_of(HybridDeviceOptimizer.step)
    between = source.partition("self._set_sub_optimizer_grads()")[2].partition("self.gpu_optimizer.step(")[0]
    return "wait" not in between


REPAIRS = (
    Repair(
        name="gradient wait",
        defect="in precision-aware mode with overlap, the part on the device may step before its gradients are cast",
        threads=("NVIDIA/Megatron-LM PR 7449",),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_gradient_wait,
        is_needed=_steps_without_waiting,
    ),
)
