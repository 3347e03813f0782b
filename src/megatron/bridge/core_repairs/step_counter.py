# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The step counter of a device optimizer that keeps it in its param groups, as Transformer Engine's and Apex's do.

`HybridDeviceOptimizer` gives its own param groups to its parts before each step. The device's part counts on in its
copy of them, and that is taken back at the next step: from a resume at step N on, every step is bias-corrected as step
N + 1. And what is saved is the hybrid's own copy, which never heard of a step; where no part is on the host (fraction
0), a checkpoint then holds no step at all, and a resume begins at 1 (NVIDIA/Megatron-LM PR 7449).
"""

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of


def _take_the_count_back(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class TakeTheCountBack(base):
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
                # Core gives each state the step that torch's Adam keeps there: here it would stand still.
                for state in self.gpu_optimizer.state.values():
                    state.pop("step", None)

    return TakeTheCountBack


def _counts_in_its_groups(optimizer: HybridDeviceOptimizer) -> bool:
    if optimizer.gpu_optimizer is None or isinstance(optimizer.gpu_optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return False
    given = source_of(HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers)
    taken_back = source_of(HybridDeviceOptimizer._sync_sub_optimizers_state_to_hdo)
    return not any(_speaks_of_the_step(source) for source in (given, taken_back))


def _speaks_of_the_step(source: str) -> bool:
    return '"step"' in source or "'step'" in source


REPAIRS = (
    Repair(
        name="step counter",
        defect="after a resume, a device optimizer that counts in its param groups takes each step for the same one; "
        "at fraction 0 no step is saved",
        threads=("NVIDIA/Megatron-LM PR 7449",),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_take_the_count_back,
        is_needed=_counts_in_its_groups,
    ),
)
