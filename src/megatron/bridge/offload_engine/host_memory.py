# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Host memory in pieces of exact size, and tensors in it that lie side by side.

Torch rounds each pinned tensor up to a power of two (pytorch/pytorch #150517), and Core pins one for each parameter.
Here a piece holds the tensors of many parameters, is as large as they are, and is pinned at once.
"""

import math
import mmap
from collections.abc import Sequence

import torch

from megatron.bridge.utils import device

ALIGNMENT = 64
"""Elements that a tensor's place is a multiple of: a multiple, too, of every vector that a kernel works in."""


class Slab:
    """FP32 tensors in one piece of host memory, zeros at first.

    Each has a storage of its own, of its own size, though the next one may begin where it ends: what clones or pickles
    a tensor with its storage, as Core's and torch's writers do, takes that tensor alone.
    """

    def __init__(self, shapes: Sequence[torch.Size], *, alignment: int = ALIGNMENT, pinned: bool = False) -> None:
        """Reserve the memory.

        Args:
            shapes: Of the tensors, in the order in which they lie.
            alignment: In elements.
            pinned: Lock the pages, where there is a device to copy to and from.
        """
        self.sizes = [math.prod(shape) for shape in shapes]
        self._places = [0]
        for size in self.sizes:
            self._places.append(self._places[-1] + -(-size // alignment) * alignment)
        self._pages: _Pages | None = None
        if torch.empty(0, device="cpu").is_meta:  # for the plan of a run
            self.tensors = [torch.empty(shape, device="cpu") for shape in shapes]
            return
        self._pages = _Pages(4 * max(self._places[-1], 1), pinned=pinned)
        self.tensors = [self.run(at, at + 1).view(shape) for at, shape in enumerate(shapes)]

    def run(self, start: int, stop: int) -> torch.Tensor:
        """The tensors from `start` to `stop` as one flat tensor; their sizes, but for the last, leave no gap."""
        size = self._places[stop - 1] + self.sizes[stop - 1] - self._places[start] if stop > start else 0
        if size == 0:
            return torch.empty(0, device="cpu")
        return device.host_tensor(self._pages, self._places[start], size)


class _Pages(mmap.mmap):
    """Zeroed memory from the system, private to this process. It goes back with the last tensor in it."""

    _locked_at: int | None = None

    def __new__(cls, num_bytes: int, *, pinned: bool) -> "_Pages":
        pages = super().__new__(cls, -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if pinned:
            pages._locked_at = device.lock_pages(pages)
        return pages

    def __del__(self) -> None:
        if self._locked_at is not None:
            device.unlock_pages(self._locked_at)
