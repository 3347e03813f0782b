# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How a step is computed is the run's own; what is computed is the checkpoint's.

On a load Core puts the checkpoint's param groups in the place of the run's, switches of the implementation included. A
run that goes on from a checkpoint without offload so loses `fused`, and its CPU Adam then steps on one tensor after
another; a run that goes on without offload keeps the switches of the hybrid optimizer it no longer has.
"""

import inspect
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.training.cpu_offload.repair import Repair, steps_by_torch_adam_or_hybrid

SWITCHES = (
    *("fused", "foreach", "capturable", "differentiable"),
    *("offload_fraction", "overlap_cpu_optimizer_d2h_h2d", "param_update_in_fp32", "pin_cpu_grads", "pin_cpu_params"),
)
"""Options of torch's Adam and of the hybrid optimizer that change no result, but how it comes about."""


def _keep_own_switches(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class KeepOwnSwitches(base):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            own = {key: value for key, value in self.optimizer.param_groups[0].items() if key in SWITCHES}
            groups = [
                {**{key: value for key, value in group.items() if key not in SWITCHES}, **own}
                for group in state_dict["optimizer"]["param_groups"]
            ]
            super().load_state_dict({**state_dict, "optimizer": {**state_dict["optimizer"], "param_groups": groups}})

    return KeepOwnSwitches


def _takes_whole_groups(optimizer: DistributedOptimizer) -> bool:
    source = inspect.getsource(DistributedOptimizer.load_state_dict)
    return steps_by_torch_adam_or_hybrid(optimizer) and "{**param_groups_map[needed_groups]," in source


REPAIRS = (
    Repair(
        name="own switches",
        defect="a resume takes the checkpoint's switches: switched on at a resume, the CPU's Adam loses its fused step",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_keep_own_switches,
        is_needed=_takes_whole_groups,
    ),
)
