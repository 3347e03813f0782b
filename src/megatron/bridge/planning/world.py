# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Pose as one rank of a run with any number of ranks, in one process and without memory, to plan large runs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.bridge.utils import distributed
from megatron.bridge.utils.device import choose_device, enter_device
from megatron.bridge.utils.replaced import replaced
from megatron.bridge.utils.simulated_accelerator import without_data


@contextlib.contextmanager
def planned_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """Within the context, this process is one of `world_size` ranks, and its tensors have shapes but no memory.

    Collectives return at once (torch's fake process group), and gathered objects are this rank's own. Process groups
    are destroyed at the end. The process stays on the simulated accelerator, so it must not train on a GPU later.

    Args:
        world_size: Number of ranks.
        rank: Which one this is.

    Raises:
        ValueError: No such rank.
        RuntimeError: There is a process group already.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} ranks: expected 0 to {world_size - 1}")
    if dist.is_initialized():
        raise RuntimeError(
            f"this process is one of {dist.get_world_size()} running ranks: plan a run in a process of its own"
        )
    enter_device(choose_device("cpu"))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with replaced(dist, all_gather_object=_gather_own), without_data():
            yield
    finally:
        distributed.destroy_model_parallel()
        dist.destroy_process_group()


def _gather_own(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = [obj] * len(object_list)
