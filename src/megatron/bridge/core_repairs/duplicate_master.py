# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Save each master once.

`HybridDeviceOptimizer` keeps the tensor that it steps on in its state, as `master_param`. In default mode the
distributed optimizer saves it in addition to the FP32 shard, which holds the same values. That is a third more to
write. It also adds keys that a run without offload doesn't have, so neither run can resume the other's checkpoint.
"""

from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of


def _single_master(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class SingleMaster(base):
        def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Any]:
            tensors = super()._get_main_param_and_optimizer_states(model_param)
            tensors.pop("master_param", None)
            return tensors

        def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
            super()._set_main_param_and_optimizer_states(model_param, {**tensors, "master_param": tensors["param"]})

    return SingleMaster


def _saves_the_master_twice(optimizer: DistributedOptimizer) -> bool:
    is_hybrid = isinstance(optimizer.optimizer, HybridDeviceOptimizer)
    takes_all_state = source_of(DistributedOptimizer._get_main_param_and_optimizer_states)
    knows_only_the_other_mode = takes_all_state.count('"master_param"') == 1
    is_precision_aware = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    return is_hybrid and not is_precision_aware and knows_only_the_other_mode


REPAIRS = (
    Repair(
        name="duplicate master",
        defect="a checkpoint holds each FP32 master twice, in a form that a run without offload can't resume",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_single_master,
        is_needed=_saves_the_master_twice,
    ),
)
