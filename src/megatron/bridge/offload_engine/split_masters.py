# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Masters stored as what their weights lack: 16 bits each, from which both together give back the FP32 bits.

A weight is its master rounded to BF16, to nearest even. Seen as integers, the master's 32 bits lie at most 2**15 from
those of the weight, shifted up. That distance is the *rest*. A master for which it isn't a 16-bit number, such as one
midway between two weights that was rounded down, or NaN, is stored by itself.

Between steps a bucket's masters are *split*: the weights are on the device, the rests on the host, and the memory of
the FP32 masters is given back to the system. A step joins a piece, steps on it and splits it again. Whoever reads
masters between steps (a save, the sync, the guard) has them *joined* first: the FP32 tensors are there again, and the
next step splits them. A load and an optimizer that has never stepped find them joined, too.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from megatron.bridge.offload_engine import piecewise_adam
from megatron.bridge.offload_engine.host_memory import Slab
from megatron.bridge.offload_engine.weight_transit import Passage, Transit
from megatron.bridge.utils import device

SPLIT_BYTES = 2
"""Of one master on the host, while it is split."""

Exceptions = tuple[torch.Tensor, torch.Tensor]
"""Indices and FP32 values of masters that weight and rest don't give back."""


def join(weight: torch.Tensor, rest: torch.Tensor, exceptions: Exceptions | None, *, into: torch.Tensor) -> None:
    """Give masters back.

    Args:
        weight: BF16, [N], on the host.
        rest: int16, [N].
        exceptions: From `split`.
        into: FP32, [N]; written.
    """
    bits = into.view(torch.int32)
    bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16).add_(rest)
    if exceptions is not None:
        into[exceptions[0]] = exceptions[1]


def split(master: torch.Tensor, *, weight: torch.Tensor, rest: torch.Tensor, room: torch.Tensor) -> Exceptions | None:
    """Round masters to weights, and store what the weights lack.

    Args:
        master: FP32, [N], on the host.
        weight: BF16, [N]; written.
        rest: int16, [N]; written.
        room: FP32, [N], overwritten.

    Returns:
        The masters that both don't give back; None if they give back all.
    """
    weight.copy_(master)
    distance = room.view(torch.int32)
    distance.copy_(weight.view(torch.int16)).bitwise_left_shift_(16)
    torch.sub(master.view(torch.int32), distance, out=distance)
    rest.copy_(distance)
    is_lost = distance.ne_(rest)
    if not is_lost.any():
        return None
    (indices,) = is_lost.nonzero(as_tuple=True)
    return indices, master[indices]


def checksum(weight: torch.Tensor) -> int:
    """The sum of a tensor's bits, as 64-bit numbers that overflow.

    Args:
        weight: BF16, [N], contiguous; its memory is aligned to 8 bytes.
    """
    whole = weight.numel() // 4 * 4
    total = weight[:whole].view(torch.int64).sum() + weight[whole:].view(torch.int16).sum()
    return int(total)


class _Piece(NamedTuple):
    """A part of a bucket."""

    weights: list[torch.Tensor]
    """Flat, on the device: parts of parameters that follow each other in the bucket."""
    master: torch.Tensor
    """Flat, of the bucket's FP32 masters; meaningful while they are joined."""
    rest: torch.Tensor
    """Flat, of its rests; meaningful while its masters are split."""


class SplitMasters:
    """Stores the masters of one bucket of BF16 parameters."""

    def __init__(self, bucket: Any, memory: Slab, transit: Transit) -> None:
        """
        Args:
            bucket: A `Bucket`. Its masters are joined.
            memory: Of the masters, not pinned.
            transit: Its hybrid optimizer's.
        """
        self.is_split = False
        self._bucket, self._memory, self._transit = bucket, memory, transit
        self._rests = Slab([torch.Size((size,)) for size in bucket.entry_sizes], dtype=torch.int16)
        self._cuts: list[list[_Piece]] = []
        self._exceptions: dict[tuple[int, int], Exceptions] = {}
        self._checksums: dict[tuple[int, int], int] = {}
        self._are_lost = False

    @torch.no_grad()
    def step(
        self,
        lists: dict[str, list[torch.Tensor]],
        options: dict[str, Any],
        finish: piecewise_adam.Finish | None = None,
        *,
        whole: bool,
    ) -> None:
        """Take one step of AdamW on each master, and queue the copies of the new weights to the device.

        Args:
            lists: As `step_in_pieces` takes them.
            options: The param group.
            finish: See `step_in_pieces`.
            whole: Whether the lists are those of the whole bucket: the run, then each other parameter.

        Raises:
            RuntimeError: The weights on the device aren't those of the last step.
        """
        self.raise_if_lost()
        if self.is_split and whole:
            self._step_on_pieces(lists, options, finish)
            return
        self.join()
        piecewise_adam.step_in_pieces(lists, options, finish)
        self._split()

    def _step_on_pieces(
        self, lists: dict[str, list[torch.Tensor]], options: dict[str, Any], finish: piecewise_adam.Finish | None
    ) -> None:
        fetched = self._fetch_each()
        with device.bypass_simulation():
            rooms = piecewise_adam.rooms_for(5)
            for at, pieces in enumerate(self._cuts):
                stored = [lists[kind][at].view(-1) for kind in ("gradient", "exp_avg", "exp_avg_sq")]
                step, first = lists["step"][at], 0
                step += 1
                for number, piece in enumerate(pieces):
                    last = first + piece.rest.numel()
                    buffer, master = next(fetched), rooms[0][: last - first]
                    self._join_piece((at, number), piece, buffer, into=master)
                    of_piece = [tensor[first:last] for tensor in stored]
                    piecewise_adam.step_on_piece(master, of_piece, step, options, finish, rooms=rooms[1:4])
                    self._split_piece((at, number), piece, master, buffer=buffer, room=rooms[4])
                    first = last

    def join(self) -> None:
        """Let the FP32 masters be there, if they aren't. All copies of weights must be queued.

        If the weights on the device aren't those of the last step, as in a load, the masters are NaN. Then they must be
        overwritten before the next step or save, which raises otherwise.
        """
        if not self.is_split:
            return
        device.start_after_current(self._transit.stream)
        fetched = self._fetch_each()
        with device.bypass_simulation(), torch.no_grad():
            for at, pieces in enumerate(self._cuts):
                for number, piece in enumerate(pieces):
                    try:
                        self._join_piece((at, number), piece, next(fetched), into=piece.master)
                    except RuntimeError:
                        piece.master.fill_(torch.nan)
                        self._are_lost = True
        self._rests.give_back()
        self.is_split = False

    def raise_if_lost(self) -> None:
        """Raise if the last `join` found other weights, and some masters are still NaN."""
        if self._are_lost and any(bool(master.isnan().any()) for master in self._bucket.masters):
            raise _changed_weights()
        self._are_lost = False

    def _split(self) -> None:
        self._cuts = list(self._cut())
        with device.bypass_simulation():
            (room,) = piecewise_adam.rooms_for(1)
            for at, pieces in enumerate(self._cuts):
                for number, piece in enumerate(pieces):
                    buffer = self._transit.next(piece.master.numel())
                    self._split_piece((at, number), piece, piece.master, buffer=buffer, room=room)
        self._memory.give_back()
        self.is_split = True

    def _fetch_each(self) -> Iterator[Passage]:
        """The pieces' weights on their way to the host, one ahead of the one that is worked on."""
        following: Passage | None = None
        pieces = [piece for pieces in self._cuts for piece in pieces]
        for at in range(len(pieces)):
            buffer = following or self._transit.fetch(pieces[at].weights)
            following = self._transit.fetch(pieces[at + 1].weights) if at + 1 < len(pieces) else None
            yield buffer

    def _join_piece(self, key: tuple[int, int], piece: _Piece, buffer: Passage, *, into: torch.Tensor) -> None:
        buffer.wait()
        weight = buffer.weights(piece.rest.numel())
        if checksum(weight) != self._checksums[key]:
            raise _changed_weights()
        join(weight, piece.rest, self._exceptions.get(key), into=into)

    def _split_piece(
        self, key: tuple[int, int], piece: _Piece, master: torch.Tensor, *, buffer: Passage, room: torch.Tensor
    ) -> None:
        buffer.wait()
        weight = buffer.weights(master.numel())
        exceptions = split(master, weight=weight, rest=piece.rest, room=room[: master.numel()])
        self._exceptions.pop(key, None)
        if exceptions is not None:
            self._exceptions[key] = exceptions
        self._checksums[key] = checksum(weight)
        buffer.copy(piece.weights, self._transit.stream, to_device=True)

    def _cut(self) -> Iterator[list[_Piece]]:
        """The pieces of the run, then those of each other parameter."""
        size = piecewise_adam.piece_elements()
        entries = zip(self._bucket.entries(), self._rests.tensors, self._bucket.weights_of_entries(), strict=True)
        for masters, rest, weights in entries:
            edges = [*range(0, rest.numel(), size), rest.numel()]
            yield [
                _Piece(_between(weights, first, last), masters[first:last], rest[first:last])
                for first, last in pairwise(edges)
            ]


def _between(tensors: list[torch.Tensor], first: int, last: int) -> list[torch.Tensor]:
    """Elements `first` to `last` of flat tensors that follow each other."""
    parts, place = [], 0
    for tensor in tensors:
        begin, end = max(first - place, 0), min(last - place, tensor.numel())
        if begin < end:
            parts.append(tensor[begin:end])
        place += tensor.numel()
    return parts


def _changed_weights() -> RuntimeError:
    return RuntimeError(
        "weights of the model aren't those that the last step left, and with optimizer.optimizer_split_masters=true "
        "the masters are stored as what these lack: call sync_hybrid_optimizer_param_copies after you change weights, "
        "or set optimizer.optimizer_split_masters=false"
    )
