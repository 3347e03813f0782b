# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Number the parameters of a group in the order in which they are in it.

The distributed optimizer finds a parameter's state by its index in its param group. It counts indices in the order of
the gradient buffers, but fills the group with FP32 parameters first. If a group has FP32 and 16-bit parameters, state
is saved and loaded under another parameter's name (radixark/Megatron-LM PR 19, NVIDIA/Megatron-LM PR 5930).
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, ToBuild


def _fp32_parameters_first(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class Fp32ParametersFirst(base):
        @classmethod
        def _build_optimizer_group_ranges(cls, *args: Any, **kwargs: Any) -> Any:
            group_index_map, group_ranges = super()._build_optimizer_group_ranges(*args, **kwargs)
            for group_index, group_range in enumerate(group_ranges):
                # `_build_model_and_main_param_groups` fills the groups in this order.
                group_range["params"].sort(key=lambda param: param.dtype != torch.float32)
                group_index_map.update(
                    {param: (group_index, place) for place, param in enumerate(group_range["params"])}
                )
            return group_index_map, group_ranges

    return Fp32ParametersFirst


def _counts_in_buffer_order(to_build: ToBuild) -> bool:
    if not to_build.trains_fp32():
        return False
    half, full = (torch.zeros(1, dtype=dtype, requires_grad=True) for dtype in (torch.bfloat16, torch.float32))
    buffers: list[Any] = [{(param.dtype, torch.float32): [{"param_map": {param: {}}}]} for param in (half, full)]
    places, _ = DistributedOptimizer._build_optimizer_group_ranges([{"params": [half, full]}], buffers)
    return places[half] == (0, 0)


REPAIRS = (
    Repair(
        name="group order",
        defect="with FP32 and 16-bit parameters in a group, state is saved and loaded under another parameter's name",
        threads=("radixark/Megatron-LM PR 19", "NVIDIA/Megatron-LM PR 5930"),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_fp32_parameters_first,
        is_needed=_counts_in_buffer_order,
        while_building=True,
    ),
)
