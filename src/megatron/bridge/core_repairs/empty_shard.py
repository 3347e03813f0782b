# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Save the step of a rank that trains nothing: one with a frozen pipeline stage, or a shard that is all padding.

Core takes the step to save from a parameter's state. Without parameters it fails on `assert len(steps) == 1`, or saves
no step. All ranks resume from the step that rank 0 saved, so this affects the others too. Here a rank without
parameters counts its steps in the param groups.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair


def _empty_shard_state(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class EmptyShardState(base):
        def step_with_ready_grads(self) -> bool:
            is_stepped = super().step_with_ready_grads()
            count_step(self.optimizer)
            return is_stepped

        def state_dict(self) -> dict[str, Any]:
            inner = self.optimizer.state_dict()
            state_dict = {"optimizer": {key: value for key, value in inner.items() if key != "state"}}
            for group in state_dict["optimizer"]["param_groups"]:
                del group["params"]
                group.setdefault("step", 0)
            if self.grad_scaler:
                state_dict["grad_scaler"] = self.grad_scaler.state_dict()
            return state_dict

    return EmptyShardState


def has_no_parameters(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has no parameters on this rank."""
    return not any(group["params"] for group in optimizer.param_groups)


def count_step(optimizer: torch.optim.Optimizer) -> None:
    """Count a step in the param groups of an optimizer without parameters."""
    for group in optimizer.param_groups:
        group["step"] = int(group.get("step", 0)) + 1


REPAIRS = (
    Repair(
        name="empty shard",
        defect="a rank that trains nothing can't be saved, or saves no step for the others",
        threads=("NVIDIA/Megatron-LM #345",),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_empty_shard_state,
        is_needed=lambda optimizer: has_no_parameters(optimizer.optimizer),
    ),
)
