# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Parameters that a model keeps in FP32 beside 16-bit ones.

Core hands the optimizer a view of such a weight that is still part of the autograd graph, which torch refuses to
optimise once the hybrid optimizer checks its parameters (NVIDIA/Megatron-LM #6212), and to load into otherwise: no run
in FP32 could be resumed. In precision-aware mode their
gradients arrive as `decoupled_grad`, which the hybrid optimizer reads for 16-bit parameters and for those on the host,
but not for an FP32 one that stays on the device: it would never move (NVIDIA/Megatron-LM PR 7449).
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, ToBuild, source_of


def _shards_outside_autograd(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class ShardsOutsideAutograd(base):
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

    return ShardsOutsideAutograd


def _detached(shard: torch.Tensor) -> torch.Tensor:
    """The same memory outside of the graph, with the attributes that Core gave the view."""
    leaf = shard.detach()
    vars(leaf).update(vars(shard), is_native_fp32=True)
    return leaf


def _views_are_in_the_graph(to_build: ToBuild) -> bool:
    source = source_of(DistributedOptimizer._build_model_and_main_param_groups)
    return to_build.trains_fp32() and "shard_model_param = model_param.view(-1)" in source


def _read_decoupled_gradients(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class ReadDecoupledGradients(base):
        def _set_sub_optimizer_grads(self) -> None:
            for param, inner in self.param_to_inner_param.items():
                if inner is param and hasattr(param, "decoupled_grad"):
                    grad = param.decoupled_grad
                    param.grad = None if grad is None else grad.to(param.dtype)
            super()._set_sub_optimizer_grads()

    return ReadDecoupledGradients


def _steps_on_fp32_weights_without_their_gradients(optimizer: HybridDeviceOptimizer) -> bool:
    params = optimizer.param_to_inner_param
    is_precision_aware = optimizer.param_to_fp32_param or any(hasattr(param, "is_native_fp32") for param in params)
    in_place = any(inner is param for param, inner in optimizer.param_to_inner_param.items())
    source = source_of(HybridDeviceOptimizer._set_sub_optimizer_grads)
    return bool(is_precision_aware) and in_place and "for param in self.param_to_fp32_param:" in source


REPAIRS = (
    Repair(
        name="native FP32 parameters",
        defect="a model with FP32 parameters can't be built with offload (can't optimize a non-leaf), nor resumed",
        threads=("NVIDIA/Megatron-LM #6212", "NVIDIA/Megatron-LM PR 7013"),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_shards_outside_autograd,
        is_needed=_views_are_in_the_graph,
        while_building=True,
    ),
    Repair(
        name="native FP32 gradients",
        defect="precision-aware, an FP32 parameter that stays on the device is never updated",
        threads=("NVIDIA/Megatron-LM PR 7449",),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_read_decoupled_gradients,
        is_needed=_steps_on_fp32_weights_without_their_gradients,
    ),
)
