# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Restore Adam's step counter and the masters bit-exact on a resume.

Core has two gaps here:

* In the dp_reshardable format `step` is not part of the sharded state. A load returns the load template's value, which
  then overwrites the counter from the param groups (NovaSky-AI/SkyRL PR 1403, Megatron-LM PR 7449).
* A load from a local checkpoint brings new tensors instead of filling those of the sub-optimizers, and Core doesn't
  copy them over: in precision-aware mode a master keeps its old value, and moments stay on the host.
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import (
    Repair,
    source_of,
    stepping_optimizers,
    steps_by_torch_adam_or_hybrid,
)
from megatron.bridge.offload_engine.state_formats import saved_dtype


def _restore_step_and_masters(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class RestoreStepAndMasters(base):
        def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Any]:
            state = super()._get_main_param_and_optimizer_states(model_param)
            return {name: tensor.to(saved_dtype(self.optimizer, name)) for name, tensor in state.items()}

        def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
            # dp_reshardable adds a flag for padding, which would stay in a precision-aware hybrid's state.
            state = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
            super()._set_main_param_and_optimizer_states(model_param, state)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            if "param_state" not in state_dict:
                return
            steps = {group["step"] for group in state_dict["optimizer"]["param_groups"] if "step" in group}
            if isinstance(self.optimizer, HybridDeviceOptimizer):
                self.optimizer._update_fp32_params_by_new_state()
                self.optimizer._move_new_state_to_right_device()
            for sub_optimizer in stepping_optimizers(self.optimizer):
                for state in sub_optimizer.state.values():
                    if "step" in state and len(steps) == 1:
                        state["step"] = torch.tensor(float(next(iter(steps))))

    return RestoreStepAndMasters


def _forgets_step_or_masters(distributed_optimizer: DistributedOptimizer) -> bool:
    saved = source_of(DistributedOptimizer.sharded_param_state_dp_reshardable)
    loaded = source_of(DistributedOptimizer.load_parameter_state_from_dp_reshardable)
    keeps_both = "if key == 'step'" not in saved and "_sync_hdo_state_to_sub_optimizers" in loaded
    return steps_by_torch_adam_or_hybrid(distributed_optimizer) and not keeps_both


REPAIRS = (
    Repair(
        name="exact resume",
        defect="a resume resets Adam's step counter and may leave masters behind",
        threads=("NovaSky-AI/SkyRL PR 1403", "NVIDIA/Megatron-LM PR 7449"),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_restore_step_and_masters,
        is_needed=_forgets_step_or_masters,
    ),
)
