# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Several samples in one row, so that little of it is padding.

Which samples share a row depends only on their lengths and the seed, so a resumed run has the same rows. The sampler
determines the order of the rows, as it does for samples.

A row says where its samples lie in `cu_seqlens`: 0 and the end of each sample, int32, as Transformer Engine names it.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from megatron.bridge.data.sft_options import PackedSequenceSpecs

__all__ = ["PackReport", "PackedDataset", "PackedSequenceSpecs", "pack_by_length", "pack_in_order"]


def pack_by_length(lengths: np.ndarray, *, size: int, seed: int) -> list[list[int]]:
    """Puts samples into rows, the longest first, each where it leaves the least room (best fit decreasing).

    Args:
        lengths: Positions of each sample, int64, each at most `size`.
        size: Positions of a row.
        seed: Decides among samples of one length.

    Returns:
        The samples of each row.
    """
    shuffled = np.random.RandomState(seed % 2**32).permutation(len(lengths))
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> rows that have it left
    rooms: list[int] = []  # the keys, sorted
    for sample in shuffled[np.argsort(-lengths[shuffled], kind="stable")]:
        length = int(lengths[sample])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            packs.append([])
            pack, room = len(packs) - 1, size
        else:
            room = rooms[place]
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        packs[pack].append(int(sample))
        left = room - length
        if not with_room.setdefault(left, []):
            insort(rooms, left)
        with_room[left].append(pack)
    return packs


def pack_in_order(lengths: np.ndarray, *, size: int) -> list[list[int]]:
    """Puts samples into rows one after the other; a new row begins where the next sample doesn't fit."""
    packs: list[list[int]] = []
    room = 0
    for sample, length in enumerate(lengths.tolist()):
        if length > room:
            packs.append([])
            room = size
        packs[-1].append(sample)
        room -= length
    return packs


@dataclass(frozen=True)
class PackReport:
    """Result of packing one set of samples."""

    packs: int
    samples: int
    tokens: int
    size: int

    def __str__(self) -> str:
        fill = 100 * self.tokens / (self.packs * self.size)
        return f"{self.packs} packs of {self.size}, {self.samples / self.packs:.1f} samples in each, {fill:.1f}% filled"


class PackedDataset(Dataset):
    """Rows of several samples.

    Attributes:
        is_packed: True: items have `cu_seqlens`.
        lengths: Positions of each row, int64 [number of rows].
        report: Figures of the rows.
    """

    is_packed = True

    def __init__(
        self, samples: Any, *, size: int, seed: int, keep_order: bool = False, multiple_of: int = 1, pad_id: int = 0
    ) -> None:
        """Packs samples.

        Args:
            samples: A dataset with `lengths`, each at most `size` rounded down to `multiple_of`.
            size: Positions of a row.
            seed: See `pack_by_length`.
            keep_order: Rows take the samples in their order, and are filled less.
            multiple_of: Each sample is padded to a multiple of this; what is added isn't learned.
            pad_id: Token that is added.
        """
        self.samples, self.multiple_of, self.pad_id = samples, multiple_of, pad_id
        lengths = self._padded(np.asarray(samples.lengths, dtype=np.int64))
        self.packs = pack_in_order(lengths, size=size) if keep_order else pack_by_length(lengths, size=size, seed=seed)
        self.lengths = np.array([lengths[pack].sum() for pack in self.packs], dtype=np.int64)
        self.report = PackReport(len(self.packs), len(lengths), int(lengths.sum()), size)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns tokens, labels, position_ids (int64) and loss_mask (float32), each [S], and cu_seqlens, on the host.

        The last position of a sample is its own last one: no label is the first token of the next sample.
        """
        samples = [self._padded_sample(self.samples[sample]) for sample in self.packs[index]]
        row = {name: torch.cat([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")}
        lengths = [len(sample["tokens"]) for sample in samples]
        row["position_ids"] = torch.cat([torch.arange(length, dtype=torch.int64) for length in lengths])
        row["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        return row

    def _padded(self, length: Any) -> Any:
        return -(-length // self.multiple_of) * self.multiple_of

    def _padded_sample(self, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        missing = self._padded(len(sample["tokens"])) - len(sample["tokens"])
        if not missing:
            return sample
        added = {"tokens": self.pad_id, "labels": self.pad_id, "loss_mask": 0}
        return {name: functional.pad(sample[name], (0, missing), value=value) for name, value in added.items()}
