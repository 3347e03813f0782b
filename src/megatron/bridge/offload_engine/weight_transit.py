# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Two buffers of host memory through which a bucket's 16-bit weights come down, piece by piece, and return.

All copies are queued on one stream. So a buffer isn't filled before it was sent, and only the host has to wait: for the
last copy into or out of a buffer, before it reads or writes there.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megatron.bridge.offload_engine.host_memory import Slab
from megatron.bridge.utils import device

NUM_BUFFERS = 2


class Passage:
    """One of the buffers."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory: torch.Tensor | None = None
        self._last_copy: Any = None

    def reserve(self, num_elements: int) -> None:
        """Let it hold that many weights."""
        if self._memory is None or self._memory.numel() < num_elements:
            self.wait()
            self._memory = Slab([torch.Size((num_elements,))], pinned=self._pinned, dtype=torch.bfloat16).tensors[0]

    def wait(self) -> None:
        """Let the host wait for the last copy into it or out of it."""
        if self._last_copy is not None:
            self._last_copy.synchronize()

    def weights(self, num_elements: int) -> torch.Tensor:
        """The first weights in it, BF16 on the host. Wait before you use them."""
        assert self._memory is not None, "not reserved"
        return self._memory[:num_elements]

    def copy(self, weights: Sequence[torch.Tensor], stream: Any, *, to_device: bool) -> None:
        """Queue a copy between the buffer and weights on the device.

        Args:
            weights: Flat BF16 tensors on the device; their elements follow each other in the buffer.
            stream: Takes the copy.
            to_device: Into the weights, or out of them.
        """
        sizes = [part.numel() for part in weights]
        with device.on_stream(stream):
            with device.bypass_simulation():
                pair = (list(weights), list(self.weights(sum(sizes)).split(sizes)))
                targets, sources = pair if to_device else reversed(pair)
                torch._foreach_copy_(targets, sources, non_blocking=True)
            self._last_copy = stream.record_event()


class Transit:
    """The buffers in turn, for one hybrid optimizer."""

    def __init__(self, *, pinned: bool) -> None:
        """
        Args:
            pinned: Pin their memory. It is allocated when it is first needed.
        """
        self.stream: Any = None
        """Takes all copies; set it before the first, and again with each new one."""
        self._buffers = [Passage(pinned=pinned) for _ in range(NUM_BUFFERS)]
        self._number = 0

    def next(self, num_elements: int) -> Passage:
        """The buffer that wasn't used last."""
        self._number += 1
        buffer = self._buffers[self._number % NUM_BUFFERS]
        buffer.reserve(num_elements)
        return buffer

    def fetch(self, weights: Sequence[torch.Tensor]) -> Passage:
        """Queue a copy of weights to the host. The host must `wait` for it."""
        buffer = self.next(sum(part.numel() for part in weights))
        buffer.copy(weights, self.stream, to_device=False)
        return buffer
