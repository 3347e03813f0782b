# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Train parameters that the model itself keeps in FP32.

Core hands the optimizer a view of such a weight that is still part of the autograd graph. Torch refuses to optimise it
once the hybrid optimizer checks its parameters (NVIDIA/Megatron-LM #6212). Without offload torch refuses to load into
it, so that no run in FP32 could resume.

In precision-aware mode gradients arrive as `decoupled_grad`. The hybrid optimizer reads that for 16-bit parameters and
for those on the host, but not for an FP32 parameter that stays on the device, which would never be updated
(NVIDIA/Megatron-LM PR 7449).
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, ToBuild, source_of


def _detached_fp32_shards(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class DetachedFp32Shards(base):
        @classmethod
        def _build_model_and_main_param_groups(
            cls, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, config: Any
        ) -> Any:
            groups = super()._build_model_and_main_param_groups(gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
            shard_groups = groups[3]  # views of FP32 parameters
            detached = {shard: _detached(shard) for shards in shard_groups for shard in shards}
            for group in [*shard_groups, *(group_range["orig_group"]["params"] for group_range in opt_group_ranges)]:
                group[:] = [detached.get(shard, shard) for shard in group]
            return groups

    return DetachedFp32Shards


def _detached(shard: torch.Tensor) -> torch.Tensor:
    """The same memory outside the autograd graph, with the attributes that Core has set on the view."""
    leaf = shard.detach()
    vars(leaf).update(vars(shard), is_native_fp32=True)
    return leaf


def _views_are_in_the_graph(to_build: ToBuild) -> bool:
    source = source_of(DistributedOptimizer._build_model_and_main_param_groups)
    return to_build.trains_fp32() and "shard_model_param = model_param.view(-1)" in source


def _decoupled_fp32_gradients(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class DecoupledFp32Gradients(base):
        def _set_sub_optimizer_grads(self) -> None:
            for param, inner in self.param_to_inner_param.items():
                if inner is param and hasattr(param, "decoupled_grad"):
                    grad = param.decoupled_grad
                    param.grad = None if grad is None else grad.to(param.dtype)
            super()._set_sub_optimizer_grads()

    return DecoupledFp32Gradients


def _steps_on_fp32_weights_without_their_gradients(optimizer: HybridDeviceOptimizer) -> bool:
    params = optimizer.param_to_inner_param
    is_precision_aware = optimizer.param_to_fp32_param or any(hasattr(param, "is_native_fp32") for param in params)
    in_place = any(inner is param for param, inner in optimizer.param_to_inner_param.items())
    source = source_of(HybridDeviceOptimizer._set_sub_optimizer_grads)
    return bool(is_precision_aware) and in_place and "for param in self.param_to_fp32_param:" in source


REPAIRS = (
    Repair(
        name="native FP32 parameters",
        defect="a model with FP32 parameters can't train with offload (can't optimize a non-leaf) and can't resume",
        threads=("NVIDIA/Megatron-LM #6212", "NVIDIA/Megatron-LM PR 7013"),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_detached_fp32_shards,
        is_needed=_views_are_in_the_graph,
        while_building=True,
    ),
    Repair(
        name="native FP32 gradients",
        defect="in precision-aware mode an FP32 parameter that stays on the device is never updated",
        threads=("NVIDIA/Megatron-LM PR 7449",),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_decoupled_fp32_gradients,
        is_needed=_steps_on_fp32_weights_without_their_gradients,
    ),
)
