# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Save a bucket in which this rank's shard is all padding (format dp_reshardable, which stores state by bucket).

Core splits each bucket evenly over the data-parallel ranks. Where little is trained, a shard may hold no parameter:
only padding between two parameters, which is stored so that the tensor is complete, or padding behind the last one,
which is not stored. Core fails on both with `empty bucket encountered`. Local checkpoints always have this format.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of
from megatron.bridge.offload_engine.state_formats import saved_dtype

STATE = ("param", "exp_avg", "exp_avg_sq")
"""The tensors that Core stores for a bucket, also in precision-aware mode."""


class _EmptyShard(NamedTuple):
    """This rank's shard of a bucket, if it holds no parameter. Sizes are in elements."""

    buffer: int
    dtype: Any
    """The buffer's dtypes: Core's key for it."""
    bucket: int
    stored: int
    """How many of the shard's elements are stored: those before the end of the last parameter."""
    bucket_size: int
    """Size of the whole bucket as it is stored."""


def _pad_empty_shards(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class PadEmptyShards(base):
        def get_parameter_state_dp_reshardable(self) -> dict[Any, Any]:
            state = super().get_parameter_state_dp_reshardable()
            for shard in _empty_shards(self):
                padding = self._zeros(shard.stored) if shard.stored else {}
                ends = {"gbuf_local_start": 0, "gbuf_local_end": shard.stored, "padding": True}
                state[shard.buffer][shard.dtype][shard.bucket].append({**padding, **ends})
            return state

        def _zeros(self, size: int) -> dict[str, torch.Tensor]:
            return {key: torch.zeros(size, dtype=saved_dtype(self.optimizer, key)) for key in STATE}

        def sharded_param_state_dp_reshardable(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            state = super().sharded_param_state_dp_reshardable(*args, **kwargs)
            for shard in _empty_shards(self):
                if not shard.stored:
                    # Core drops empty entries from a list, and the entries behind them move up. A rank with nothing
                    # to store reads one element, so that its entry is not empty.
                    (padding,) = state[shard.buffer][shard.dtype][shard.bucket]
                    padding["param"] = self._copy_of_last_element(shard)
            return state

        def _copy_of_last_element(self, shard: _EmptyShard) -> ShardedTensor:
            return ShardedTensor(
                f"optimizer.distributed.dp_group_idx_{self.data_parallel_group_idx}.gbuf_idx_{shard.buffer}"
                f".dtype_{shard.dtype}.bucket_idx_{shard.bucket}.param",
                torch.zeros(1),
                torch.float32,
                (1,),
                (shard.bucket_size,),
                (shard.bucket_size - 1,),
                axis_fragmentations=None,
                replica_id=(self.distributed_optimizer_instance_id, 0, 1),  # read, not written
            )

    return PadEmptyShards


def _empty_shards(optimizer: DistributedOptimizer) -> Iterator[_EmptyShard]:
    """The buckets in which this rank holds no parameter."""
    ranks = optimizer.data_parallel_group
    for buffer, by_dtype in enumerate(optimizer.gbuf_ranges):
        for dtype, ranges in by_dtype.items():
            for number, of_bucket in enumerate(ranges):
                if not of_bucket["param_map"]:
                    bucket = optimizer.buffers[buffer].buckets[number]
                    size = bucket.grad_data.numel() // ranks.size()
                    start = size * ranks.rank()
                    stored = max(0, min(size, bucket.numel_unpadded - start))
                    yield _EmptyShard(buffer, dtype, number, stored, bucket.numel_unpadded)


def _fails_on_an_empty_shard(optimizer: DistributedOptimizer) -> bool:
    source = source_of(DistributedOptimizer.sharded_param_state_dp_reshardable)
    return "'empty bucket encountered'" in source and any(_empty_shards(optimizer))


REPAIRS = (
    Repair(
        name="empty bucket",
        defect="state can't be saved by bucket where a rank's shard of a bucket is all padding",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_pad_empty_shards,
        is_needed=_fails_on_an_empty_shard,
    ),
)
