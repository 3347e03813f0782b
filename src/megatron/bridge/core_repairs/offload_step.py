# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Replace Core's offloaded step by that of `offload_engine/`, which works in buckets and is bit-exact with Core's."""

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, ToBuild, mixing_in, source_of
from megatron.bridge.offload_engine.shards import ContiguousShards
from megatron.bridge.offload_engine.step import BucketedStep


def _copies_tensor_by_tensor(to_build: ToBuild) -> bool:
    config = to_build.config
    source = source_of(HybridDeviceOptimizer._get_sub_optimizer_param_groups)
    return config.optimizer_cpu_offload and config.optimizer == "adam" and ".clone().cpu().pin_memory()" in source


def _clones_each_weight(to_build: ToBuild) -> bool:
    config = to_build.config
    source = source_of(DistributedOptimizer._build_model_and_main_param_groups)
    has_shards = config.optimizer_cpu_offload and not config.use_precision_aware_optimizer
    return has_shards and "shard_main_param = shard_model_param.clone().float()" in source


REPAIRS = (
    Repair(
        name="flat step",
        defect="each offloaded parameter is copied and stepped on by itself, in memory rounded up to powers of two",
        threads=("pytorch/pytorch #150517",),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=mixing_in(BucketedStep),
        is_needed=_copies_tensor_by_tensor,
        while_building=True,
    ),
    Repair(
        name="flat shards",
        defect="the FP32 shard of each offloaded weight crosses to the device by itself",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=mixing_in(ContiguousShards),
        is_needed=_clones_each_weight,
        while_building=True,
    ),
)
