# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Ranks that share a batch must have made the same samples: nothing later would show that they didn't."""

import zlib
from collections.abc import Iterable

import numpy as np

from megatron.bridge.utils.distributed import all_gathered, format_ranks, world_size


def check_same_on_all_ranks(arrays: Iterable[np.ndarray], where: str) -> None:
    """Refuses samples that aren't the same on all ranks. Collective.

    Args:
        arrays: The samples, contiguous.
        where: Names them in the error.

    Raises:
        ValueError: On all ranks.
    """
    if world_size() == 1:
        return
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.data, checksum)
    seen = all_gathered(checksum)
    others = [rank for rank, found in enumerate(seen) if found != seen[0]]
    if others:
        raise ValueError(
            f"{where}: {format_ranks(others)} made other samples of it than rank 0: give every machine the same data; "
            "process_example_fn and filter_fn must do the same with a row each time"
        )
