# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which part of each weight a rank of a planned run holds."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.bridge.checkpoint.model_checkpoint import model_sharded_state_dict
from megatron.bridge.planning.memory import planned_run
from megatron.bridge.training.config import ConfigContainer


@dataclass(frozen=True, kw_only=True)
class WeightShard:
    """One weight's part on one rank, under the name that it has in a checkpoint."""

    name: str
    dtype: str
    whole: tuple[int, ...]
    """Shape over all ranks; weights of all layers, and of all experts, are stacked under one name."""
    held: tuple[int, ...]
    """Shape of this rank's part."""
    begins_at: tuple[int, ...]
    """Its first index in the whole."""
    num_bytes: int


def plan_shards(cfg: ConfigContainer, *, world_size: int, rank: int = 0) -> list[WeightShard]:
    """The weights of one rank, as in a run. Use a separate process, as for `plan_memory`.

    Args:
        cfg: What a recipe returns. It isn't changed.
        world_size: Ranks of the run.
        rank: Which of them.

    Raises:
        ValueError: The configuration can't work on that many ranks.
    """
    with planned_run(cfg, world_size, rank) as run:
        return list(_shards_in(model_sharded_state_dict(run.model)))


def _shards_in(state_dict: object) -> Iterator[WeightShard]:
    for stored in nested_values(state_dict):
        parts = [stored]
        if isinstance(stored, ShardedTensorFactory):  # gate and up: one weight in the model, two in a checkpoint
            parts = list(nested_values([stored.build()]))
        for part in parts:
            if isinstance(part, ShardedTensor):
                yield WeightShard(
                    name=part.key,
                    dtype=str(part.dtype).removeprefix("torch."),
                    whole=tuple(part.global_shape),
                    held=tuple(part.local_shape),
                    begins_at=tuple(part.global_offset),
                    num_bytes=part.data.numel() * part.data.element_size(),
                )


def as_table(shards: list[WeightShard]) -> str:
    """One line for each weight, and their sum."""
    rows = [("weight", "dtype", "whole", "held", "begins at", "MiB")]
    for shard in shards:
        whole, held = ("x".join(map(str, shape)) for shape in (shard.whole, shard.held))
        begin = ",".join(map(str, shard.begins_at))
        rows.append((shard.name, shard.dtype, whole, held, begin, f"{shard.num_bytes / 2**20:.2f}"))
    rows.append((f"{len(shards)} weights", "", "", "", "", f"{sum(s.num_bytes for s in shards) / 2**20:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
