# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Save and restore the state of an optimizer that is not distributed, from step 0 on, with its step.

Core's traps:

* Before a load it fills the state by a function that SGD doesn't have (`TypeError`), and without the step that torch's
  Adam keeps in its state.
* It doesn't save a step of 0. Where no step was taken (in FP16 all may have overflowed) it saves no state at all. A
  load then asks for tensors that don't exist, or the next step fails with KeyError.
* The Adam of Transformer Engine and Apex keeps the step in the param groups, torch's keeps it in the state. What one
  of them saved, the other doesn't find.
* All ranks resume from what rank 0 saved of the common state. If rank 0 trains nothing (a frozen stage, or experts
  only elsewhere), it saves no step, and empty lists that fit no other rank.
* It names the state after the 16-bit parameters alone. With FP32 parameters among them, no run could be saved.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer

from megatron.bridge.core_repairs.empty_shard import count_step, has_no_parameters
from megatron.bridge.core_repairs.load_template import allocate_state
from megatron.bridge.core_repairs.repair import Repair, source_of
from megatron.bridge.utils.replaced import replaced

MASTERS = "fp32_from_fp16_params"
"""Core's key for the masters of 16-bit weights: a list for each param group."""


def _state_from_step_zero(base: type) -> type:
    """Overrides of `FP32Optimizer` and `Float16OptimizerWithFloat16Params`."""

    class StateFromStepZero(base):
        def step_with_ready_grads(self) -> bool:
            is_stepped = super().step_with_ready_grads()
            if has_no_parameters(self.optimizer):
                count_step(self.optimizer)
            return is_stepped

        def sharded_state_dict(
            self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
        ) -> Any:
            allocate_state(self.optimizer)  # replaces Core's own filling, which `is_loading` would start
            with _all_parameters_in_order(self) as are_masters:
                saved = super().sharded_state_dict(model_sharded_state_dict, is_loading=False, metadata=metadata)
            if has_no_parameters(self.optimizer):
                _keep_step_without_parameters(saved.get("optimizer", saved))
            if MASTERS in saved:
                masters = map(list, map(itertools.compress, saved[MASTERS], are_masters))
                # A dict, not a list: Core drops empty entries from a list, and the entries behind them move up.
                saved[MASTERS] = {number: of_group for number, of_group in enumerate(masters) if of_group}
            return saved

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            step = _move_step(self.optimizer, state_dict.get("optimizer", state_dict))
            if isinstance(self, Float16OptimizerWithFloat16Params):
                masters, numbers = state_dict.get(MASTERS, {}), range(len(self.optimizer.param_groups))
                state_dict[MASTERS] = [masters.get(number, []) for number in numbers]
            super().load_state_dict(state_dict)
            if has_no_parameters(self.optimizer):
                for group in self.optimizer.param_groups:
                    group["step"] = int(step)

    return StateFromStepZero


@contextlib.contextmanager
def _all_parameters_in_order(optimizer: MegatronOptimizer) -> Iterator[list[list[bool]]]:
    """Within the context, Core names state after all parameters in the torch optimizer's order, FP32 ones included.

    Yields:
        For each param group, whether each of its parameters is the master of a 16-bit one.
    """
    if isinstance(optimizer, FP32Optimizer):
        yield []
        return
    masters, params = optimizer.fp32_from_float16_groups, optimizer.float16_groups
    model_param = dict(zip(*(itertools.chain.from_iterable(groups) for groups in (masters, params)), strict=True))
    stepped_on = [list(group["params"]) for group in optimizer.optimizer.param_groups]
    in_model = [[model_param.get(param, param) for param in group] for group in stepped_on]
    with replaced(optimizer, float16_groups=in_model, fp32_from_float16_groups=stepped_on):
        yield [[param in model_param for param in group] for group in stepped_on]


def _keep_step_without_parameters(saved: dict[str, Any]) -> None:
    """Move the step counted in the param groups to where torch's Adam saves it. Changes `saved`."""
    steps = [group.pop("step", 0) for group in saved["param_groups"]]
    saved["state"]["common_step"] = torch.tensor(float(max(steps, default=0)))


def _move_step(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> float:
    """Move a saved step to where this optimizer keeps it, state or param groups, and return it. Changes `saved`."""
    groups = saved["param_groups"]
    in_groups = [group.pop("step") for group in groups if group.get("step") is not None]
    step = float(saved["state"].pop("common_step", max(map(float, in_groups), default=0.0)))
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        saved["state"]["common_step"] = torch.tensor(step)
    elif any("betas" in group for group in groups):
        for group in groups:
            group["step"] = int(step)
    return step


def _loses_the_step(optimizer: MegatronOptimizer) -> bool:
    source = source_of(MegatronOptimizer._extract_common_per_param_step)
    saved = source_of(_core_class(optimizer).sharded_state_dict)
    return "self.init_state_fn(self.optimizer" in saved and "param_groups" not in source


def _core_class(optimizer: MegatronOptimizer) -> Any:
    is_fp32 = isinstance(optimizer, FP32Optimizer)
    return FP32Optimizer if is_fp32 else Float16OptimizerWithFloat16Params


REPAIRS = tuple(
    Repair(
        name=name,
        defect="without the distributed optimizer, SGD can't be resumed, nor can a run saved before its first step; a "
        "step that another implementation of Adam saved is lost",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=target,
        subclass=_state_from_step_zero,
        is_needed=_loses_the_step,
    )
    for name, target in (("plain FP32 state", FP32Optimizer), ("plain state", Float16OptimizerWithFloat16Params))
)
