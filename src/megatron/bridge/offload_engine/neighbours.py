# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which tensors lie side by side in memory."""

from collections.abc import Iterator
from itertools import pairwise

import torch


def breaks(tensors: list[torch.Tensor]) -> Iterator[int]:
    """The indices of tensors that don't begin, in memory, where the one before them ends."""
    for at, (one, following) in enumerate(pairwise(tensors), start=1):
        is_dense = one.is_contiguous() and following.is_contiguous() and one.dtype == following.dtype
        if not is_dense or one.data_ptr() + one.nbytes != following.data_ptr():
            yield at


def is_in_one_storage(first: torch.Tensor, size: int) -> bool:
    """Whether a view that starts at `first` can span `size` elements: its neighbours share its storage.

    Neighbouring addresses alone don't say so: two allocations can be adjacent by chance.
    """
    storage = first.untyped_storage()
    return first.data_ptr() + size * first.element_size() <= storage.data_ptr() + storage.nbytes()
