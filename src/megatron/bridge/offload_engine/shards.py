# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""FP32 shards that lie side by side on the device, so that a bucket crosses to the host and back in one copy.

In default mode Core clones each 16-bit weight into an FP32 tensor of its own, and an offloaded step makes one copy for
each of them. Here the same tensors lie in a few allocations, in the order of a bucket's masters (`bucket.py`).
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.offload_engine.bucket import is_aligned
from megatron.bridge.offload_engine.host_memory import ALIGNMENT
from megatron.bridge.offload_engine.step import split_into_buckets


class ContiguousShards(DistributedOptimizer):
    """Overrides that make the FP32 shards contiguous; mixed into Core's class or a subclass of it."""

    @classmethod
    def _build_model_and_main_param_groups(
        cls, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, config: Any
    ) -> Any:
        groups = super()._build_model_and_main_param_groups(gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
        for shards in groups[4]:  # the FP32 shards of 16-bit parameters; those of FP32 ones are views and stay
            make_contiguous(shards)
        return groups


@torch.no_grad()
def make_contiguous(shards: list[torch.Tensor]) -> None:
    """Move tensors into new memory, one bucket at a time. They stay the same objects: Core keeps references to them.

    Args:
        shards: Flat FP32 tensors on one device that share their memory with nothing; changed in place.
    """
    for bucket in split_into_buckets(shards):
        bucket.sort(key=lambda shard: not is_aligned(shard))
        places = [-(-shard.numel() // ALIGNMENT) * ALIGNMENT for shard in bucket]
        piece = bucket[0].new_empty(sum(places))
        for shard, place in zip(bucket, piece.split(places), strict=True):
            shard.data = place[: shard.numel()].copy_(shard)
