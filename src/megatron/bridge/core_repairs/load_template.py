# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Create optimizer state to load into without taking a step.

Core fills an empty hybrid optimizer by `dummy_step`: a real step with random gradients and the real learning rate. It
changes the weights that were just loaded (Megatron-LM #1842). Without Transformer Engine or Apex, Core doesn't fill a
plain torch Adam at all: building the load template, or saving before the first step, fails on
`assert len(steps) == 1`.
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of, steps_by_torch_adam_or_hybrid
from megatron.bridge.offload_engine.adam import FlatAdam


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of an optimizer the state of step 0: zero moments, step counter 0. Existing state is kept.

    Args:
        optimizer: Torch's Adam, AdamW or SGD, the fused ones of Transformer Engine or Apex, or a hybrid of those.
    """
    if isinstance(optimizer, HybridDeviceOptimizer):
        for sub_optimizer in optimizer.sub_optimizers:
            allocate_state(sub_optimizer)
        optimizer._sync_sub_optimizers_state_to_hdo()
        return
    if isinstance(optimizer, FlatAdam):
        optimizer.allocate_state()
        return
    keeps_step_in_state = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for group in optimizer.param_groups:
        if "betas" not in group:
            _allocate_momentum(optimizer, group)
            continue
        for param in group["params"]:
            if not optimizer.state[param]:
                state: dict[str, Any] = {"step": torch.tensor(0.0)} if keeps_step_in_state else {}
                state["exp_avg"] = torch.zeros_like(param.data)
                state["exp_avg_sq"] = torch.zeros_like(param.data)
                optimizer.state[param] = state


def _allocate_momentum(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    for param in group["params"] if group.get("momentum") else ():
        if optimizer.state[param].get("momentum_buffer") is None:
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param.data)


def _allocated_template(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class AllocatedTemplate(base):
        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            if not self.is_stub_optimizer:
                allocate_state(self.optimizer)
            return super().sharded_state_dict(*args, **kwargs)

    return AllocatedTemplate


def _allocating_dummy_step(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class AllocatingDummyStep(base):
        def dummy_step(self) -> None:
            allocate_state(self)

    return AllocatingDummyStep


def _asserts_a_step(distributed_optimizer: DistributedOptimizer) -> bool:
    source = source_of(DistributedOptimizer.state_dict)
    return steps_by_torch_adam_or_hybrid(distributed_optimizer) and "assert len(steps) == 1" in source


def _dummy_step_steps(optimizer: HybridDeviceOptimizer) -> bool:
    return "self.step()" in source_of(HybridDeviceOptimizer.dummy_step)


THREADS = ("NVIDIA/Megatron-LM #1842",)
REPAIRS = (
    Repair(
        name="load template",
        defect="an optimizer that never stepped can't be saved or loaded into",
        threads=THREADS,
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_allocated_template,
        is_needed=_asserts_a_step,
    ),
    Repair(
        name="no dummy step",
        defect="dummy_step steps on random gradients and changes the weights",
        threads=THREADS,
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_allocating_dummy_step,
        is_needed=_dummy_step_steps,
    ),
)
