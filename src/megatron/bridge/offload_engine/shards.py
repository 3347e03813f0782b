# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""FP32 shards that lie side by side on the device, so that they cross to the host and back as one.

Without the precision-aware mode, Core clones each 16-bit weight into an FP32 tensor of its own, which an offloaded step
then takes one copy to fill. Here the shards of a group are the same tensors in few pieces of memory, in the order in
which a bucket's masters lie (`adam.py`).
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.offload_engine.adam import is_aligned
from megatron.bridge.offload_engine.host_memory import ALIGNMENT
from megatron.bridge.offload_engine.step import split_into_buckets


class ContiguousShards(DistributedOptimizer):
    """Overrides that lay the FP32 shards side by side; mixed into Core's class or a subclass of it."""

    @classmethod
    def _build_model_and_main_param_groups(
        cls, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, config: Any
    ) -> Any:
        groups = super()._build_model_and_main_param_groups(gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
        for shards in groups[4]:  # FP32 clones of 16-bit parameters; views of FP32 ones stay where they are
            make_contiguous(shards)
        return groups


@torch.no_grad()
def make_contiguous(shards: list[torch.Tensor]) -> None:
    """Move tensors into new memory, a bucket's worth at a time; they stay the same objects.

    Args:
        shards: Flat FP32 tensors on one device, which share their memory with nothing.
    """
    for bucket in split_into_buckets(shards):
        bucket.sort(key=lambda shard: not is_aligned(shard))
        places = [-(-shard.numel() // ALIGNMENT) * ALIGNMENT for shard in bucket]
        piece = bucket[0].new_empty(sum(places))
        for shard, place in zip(bucket, piece.split(places), strict=True):
            shard.data = place[: shard.numel()].copy_(shard)
