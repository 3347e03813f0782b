# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Host memory of exact size for many tensors that lie side by side.

Torch rounds each pinned tensor up to a power of two (pytorch/pytorch #150517), and Core pins one for each parameter.
Here one allocation holds the tensors of many parameters. It is as large as they are, and is pinned as a whole.
"""

import math
import mmap
from collections.abc import Sequence

import torch

from megatron.bridge.utils import device

ALIGNMENT = 64
"""Alignment of each tensor, in elements: a multiple of every vector length that a CPU kernel uses."""


class Slab:
    """Tensors of one dtype in one allocation of host memory, zero at first.

    Each tensor has a storage of its own size, although its neighbours share the allocation. Core's and torch's writers
    clone or pickle a tensor together with its storage. With one storage for all they would write the whole slab for
    each tensor.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        *,
        alignment: int = ALIGNMENT,
        pinned: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate the memory.

        Args:
            shapes: Shapes of the tensors, in memory order.
            alignment: Alignment of each tensor, in elements.
            pinned: Lock the pages, if there is a real device.
            dtype: Of the tensors.
        """
        self.dtype = dtype
        self.sizes = [math.prod(shape) for shape in shapes]
        self._places = [0]
        for size in self.sizes:
            self._places.append(self._places[-1] + -(-size // alignment) * alignment)
        self._pages: _Pages | None = None
        if torch.empty(0, device="cpu").is_meta:  # a run is being planned: shapes are enough
            self.tensors = [torch.empty(shape, device="cpu", dtype=dtype) for shape in shapes]
            return
        self._pages = _Pages(dtype.itemsize * max(self._places[-1], 1), pinned=pinned)
        self.tensors = [self.run(at, at + 1).view(shape) for at, shape in enumerate(shapes)]

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Tensors `start` to `stop` as one flat tensor that shares their memory.

        All but the last must be a multiple of the alignment in size, so that there is no gap between them.
        """
        size = self._places[stop - 1] + self.sizes[stop - 1] - self._places[start] if stop > start else 0
        if size == 0:
            return torch.empty(0, device="cpu", dtype=self.dtype)
        return device.host_tensor(self._pages, self._places[start], size, dtype=self.dtype)

    def give_back(self) -> None:
        """Give the memory back to the system until it is written again. What it held is lost; it mustn't be pinned."""
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)

    def unpin(self) -> None:
        """Let it be pageable from now on."""
        if self._pages is not None:
            self._pages.unlock()


class _Pages(mmap.mmap):
    """Zeroed memory from the system, private to this process. It is freed with the last tensor in it."""

    _locked_at: int | None = None

    def __new__(cls, num_bytes: int, *, pinned: bool) -> "_Pages":
        pages = super().__new__(cls, -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if pinned:
            pages._locked_at = device.lock_pages(pages)
        return pages

    def unlock(self) -> None:
        if self._locked_at is not None:
            device.unlock_pages(self._locked_at)
            self._locked_at = None

    def __del__(self) -> None:
        self.unlock()
