# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Keep the step counter of a sub-optimizer that stores it in its param groups, as those of Transformer Engine and Apex.

`HybridDeviceOptimizer` copies its own param groups to its sub-optimizers before each step. The sub-optimizer on the
device increments `step` in its copy, and the next step overwrites it: after a resume at step N, every step is
bias-corrected as step N + 1. A checkpoint holds the hybrid's own param groups, which never get the step. With nothing
on the host (offload fraction 0) it then holds no step at all, and a resume starts at 1 (NVIDIA/Megatron-LM PR 7449).
"""

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of


def _step_in_param_groups(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class StepInParamGroups(base):
        def _sync_sub_optimizers_state_to_hdo(self) -> None:
            super()._sync_sub_optimizers_state_to_hdo()
            if self.gpu_optimizer is None:
                return
            counts = {
                self.inner_param_to_orig_param[param]: group["step"]
                for group in self.gpu_optimizer.param_groups
                for param in group["params"]
                if "step" in group
            }
            for group in self.param_groups:
                steps = [counts[param] for param in group["params"] if param in counts]
                if steps:
                    group["step"] = steps[0]  # a group's parameters are stepped together

        def _sync_hdo_state_to_sub_optimizers(self) -> None:
            super()._sync_hdo_state_to_sub_optimizers()
            if self.gpu_optimizer is not None:
                # Core copies a step into each state, where torch's Adam keeps it. This sub-optimizer would never
                # increment it there.
                for state in self.gpu_optimizer.state.values():
                    state.pop("step", None)

    return StepInParamGroups


def _counts_in_its_groups(optimizer: HybridDeviceOptimizer) -> bool:
    if optimizer.gpu_optimizer is None or isinstance(optimizer.gpu_optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return False
    given = source_of(HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers)
    taken_back = source_of(HybridDeviceOptimizer._sync_sub_optimizers_state_to_hdo)
    return not any(_mentions_step(source) for source in (given, taken_back))


def _mentions_step(source: str) -> bool:
    return '"step"' in source or "'step'" in source


REPAIRS = (
    Repair(
        name="step counter",
        defect="after a resume, a sub-optimizer that counts steps in its param groups repeats the same step number; "
        "at offload fraction 0 no step is saved",
        threads=("NVIDIA/Megatron-LM PR 7449",),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_step_in_param_groups,
        is_needed=_counts_in_its_groups,
    ),
)
