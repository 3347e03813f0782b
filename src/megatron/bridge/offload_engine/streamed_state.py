# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adam on the device for state that lives on the host: it passes through two buffers, piece by piece.

A piece is a bucket, or a part of a bucket that is one large parameter. Its masters and moments are copied up, the
device's own optimizer steps on them, the weights are written, and masters and moments are copied down:

    up       piece 1 | piece 2 | ......... 3 | 4 ...
    current  backward  | Adam on 1 | on 2 | on 3 ...
    down                      | piece 1 | 2 | 3 ...

Four waits keep the order: the current stream waits until a piece is up, `down` until it was stepped on, `up` until the
piece that was in the same buffer before is down, and the host, at the end, until all is down. `up` doesn't wait for the
current stream: the first two pieces are copied while the backward pass still runs.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from megatron.bridge.offload_engine.bucket import MOMENTS, Bucket
from megatron.bridge.offload_engine.host_memory import ALIGNMENT
from megatron.bridge.utils import device

PIECE_ELEMENTS = 1 << 23
"""Elements of a buffer at most: 96 MiB of masters and moments."""

NUM_BUFFERS = 2
KINDS = ("master", *MOMENTS)
FP32_BYTES = 4


class _Part(NamedTuple):
    """Elements `first` to `last` of parameter number `at` of a bucket, as they lie in a buffer."""

    at: int
    first: int
    last: int
    master: torch.Tensor


class _Buffer:
    """Device memory for one piece, and the event after which it may be overwritten."""

    def __init__(self, num_elements: int) -> None:
        self.memory = torch.empty(len(KINDS), num_elements, device=device.current_device())
        self.is_down: Any = None


class _Piece:
    """A part of a bucket's state on the host, its place in a buffer, and the device's optimizer over that place."""

    def __init__(self, bucket: Bucket, start: int, stop: int, *, buffer: _Buffer, adam: type, options: dict) -> None:
        """
        Args:
            bucket: Its state is in its slabs.
            start: The piece's first element in the slabs.
            stop: The element after its last.
            buffer: Through which it passes.
            adam: The class that steps on the device.
            options: Those of a param group that it needs to be built.
        """
        self.buffer = buffer
        self._bucket, self._range = bucket, slice(start, stop)
        self.on_device = [place[: stop - start] for place in buffer.memory.unbind()]
        self.parts = []
        states = []
        for at, (place, param) in enumerate(zip(_places(bucket), bucket.params, strict=True)):
            first, last = max(start - place, 0), min(stop - place, param.numel())
            if first >= last and param.numel():
                continue
            shape = param.shape if last - first == param.numel() else (last - first,)
            begin = place + first - start
            views = [one[begin : begin + last - first].view(shape) for one in self.on_device]
            self.parts.append(_Part(at, first, last, views[0]))
            states.append(dict(zip(MOMENTS, views[1:], strict=True)))
        masters = [part.master for part in self.parts]
        self._adam = adam([{**options, "params": masters}])
        for master, state in zip(masters, states, strict=True):
            self._adam.state[master] = state

    def on_host(self) -> list[torch.Tensor]:
        """Its memory on the host, of each kind."""
        memory = self._bucket.memory()
        return [memory[kind][self._range] for kind in KINDS]

    def step(self, options: dict, params: list[torch.Tensor], gradients: list[Any], counters: list[float]) -> None:
        """Step on the buffer, and write the weights. All on the current stream; the host doesn't wait.

        Args:
            options: Of the param group, as for this step.
            params: The bucket's parameters on the device.
            gradients: Of each parameter, None where it has none.
            counters: Steps that each parameter has taken.
        """
        stepped = [part for part in self.parts if gradients[part.at] is not None]
        for counter in sorted({counters[part.at] for part in stepped}):  # usually one
            self._step_at(counter, options, [part for part in stepped if counters[part.at] == counter], gradients)
        weights = [_range_of(params[part.at].data, part) for part in self.parts]
        with device.bypass_simulation():
            torch._foreach_copy_(weights, [part.master for part in self.parts])

    def _step_at(self, counter: float, options: dict, parts: list[_Part], gradients: list[Any]) -> None:
        """Step on the parameters that have taken the same number of steps."""
        group = self._adam.param_groups[0]
        group.update(options)
        if isinstance(self._adam, torch.optim.Adam | torch.optim.AdamW):
            on_device = group.get("fused") or group.get("capturable")
            place = device.current_device() if on_device else torch.device("cpu")
            for part, step in zip(parts, torch.full((len(parts),), counter, device=place).unbind(), strict=True):
                self._adam.state[part.master]["step"] = step
        else:  # those of Transformer Engine and Apex count in their groups
            group["step"] = int(counter)
        for part in parts:
            part.master.grad = _range_of(gradients[part.at], part).to(part.master.dtype)
        self._adam.step()
        for part in parts:
            part.master.grad = None


class Pipeline:
    """Steps on the device on buckets whose state lives on the host."""

    def __init__(self, buckets: Sequence[Bucket], adam: type) -> None:
        """
        Args:
            buckets: All that will pass through. Memory is allocated by the first step.
            adam: The class that steps on the device, as it does without offload.
        """
        self._adam = adam
        self._up, self._down = device.new_stream(), device.new_stream()
        self._num_elements = min(PIECE_ELEMENTS, max(map(_size_of, buckets)))
        self._buffers: list[_Buffer] = []
        self._pieces: dict[Bucket, list[_Piece]] = {}
        self._num_pieces = 0

    @property
    def buffer_bytes(self) -> int:
        """Device memory of the buffers."""
        return NUM_BUFFERS * len(KINDS) * FP32_BYTES * self._num_elements

    @torch.no_grad()
    def step(self, bucket: Bucket, options: dict, gradients: list[Any], counters: list[float]) -> None:
        """Queue a bucket's step. The caller must `wait` before the host reads the state or changes it.

        Args:
            bucket: All its state is in its slabs.
            options: Of its param group.
            gradients: On the device, of each parameter; None where it has none.
            counters: Steps that each parameter has taken.
        """
        for piece in self._pieces_of(bucket, options):
            with device.on_stream(self._up):
                if piece.buffer.is_down is not None:
                    piece.buffer.is_down.wait(self._up)
                _copy(piece.on_device, piece.on_host())
            device.wait_for_stream(self._up)
            piece.step(options, bucket.params, gradients, counters)
            self._down.wait_stream(device.current_stream())
            with device.on_stream(self._down):
                _copy(piece.on_host(), piece.on_device)
            piece.buffer.is_down = self._down.record_event()

    def wait(self) -> None:
        """Let the host wait until all state is back in its memory."""
        self._down.synchronize()

    def _pieces_of(self, bucket: Bucket, options: dict) -> list[_Piece]:
        if bucket not in self._pieces:
            if not self._buffers:
                with device.on_stream(self._up):  # it writes them first: no other stream's old memory
                    self._buffers = [_Buffer(self._num_elements) for _ in range(NUM_BUFFERS)]
            self._pieces[bucket] = list(self._cut(bucket, options))
        return self._pieces[bucket]

    def _cut(self, bucket: Bucket, options: dict) -> Iterator[_Piece]:
        size = _size_of(bucket)
        for start in range(0, size, self._num_elements):
            buffer = self._buffers[self._num_pieces % NUM_BUFFERS]
            self._num_pieces += 1
            stop = min(start + self._num_elements, size)
            yield _Piece(bucket, start, stop, buffer=buffer, adam=self._adam, options=options)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    with device.bypass_simulation():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)


def _places(bucket: Bucket) -> list[int]:
    """The first element of each parameter in the bucket's slabs, and the end of the last."""
    return list(accumulate((-(-param.numel() // ALIGNMENT) * ALIGNMENT for param in bucket.params), initial=0))[:-1]


def _size_of(bucket: Bucket) -> int:
    """Elements of each kind, with the gaps between parameters."""
    return _places(bucket)[-1] + bucket.params[-1].numel()


def _range_of(tensor: torch.Tensor, part: _Part) -> torch.Tensor:
    """The elements of a parameter or its gradient that are in a piece: itself, or a part of it, flat."""
    return tensor if part.last - part.first == tensor.numel() else tensor.view(-1)[part.first : part.last]
