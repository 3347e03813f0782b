# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which samples make up which batch: a pure function of the number of samples consumed.

Training runs through an endless line of positions: position p is sample `order(epoch)[p % N]` of epoch p // N, with N
samples in the dataset. A global batch is the next `global_batch_size` positions, cut into micro-batches that are dealt
to the data-parallel ranks in turn. So what a global batch (and each of its micro-batches) holds depends neither on
where a run was stopped nor on the number of ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

PADDING_ROW = -1


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How a global batch is dealt to data-parallel ranks.

    Raises:
        ValueError: The sizes don't divide, or the rank does not exist.
    """

    micro_batch_size: int
    global_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: expected 1 or more")
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise ValueError(
                f"data-parallel rank {self.data_parallel_rank} of {self.data_parallel_size} does not exist"
            )
        if self.global_batch_size % self.rows_at_once:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of train.micro_batch_size="
                f"{self.micro_batch_size} x data-parallel size {self.data_parallel_size}: change one of them"
            )

    @property
    def rows_at_once(self) -> int:
        """Rows of one micro-batch on every data-parallel rank."""
        return self.micro_batch_size * self.data_parallel_size

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of this rank in a full global batch."""
        return self.global_batch_size // self.rows_at_once

    def rank_slice(self, rows: np.ndarray) -> np.ndarray:
        """Returns this rank's rows as [micro-batches, micro_batch_size]; `rows` is [multiple of rows_at_once]."""
        return rows.reshape(-1, self.data_parallel_size, self.micro_batch_size)[:, self.data_parallel_rank]


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Returns the shuffled order of one epoch: a permutation, int64 [num_samples], read-only."""
    # RandomState's stream is frozen across NumPy versions, so a resumed run sees the order it began with.
    order = np.random.RandomState([seed % 2**32, epoch]).permutation(num_samples).astype(np.int64)
    order.flags.writeable = False
    return order


def sample_indices(start: int, count: int, *, num_samples: int, seed: int, shuffle: bool) -> np.ndarray:
    """Returns the samples at positions `start` to `start + count`, int64 [count]; epochs follow without a gap."""
    positions = np.arange(start, start + count, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_samples)
    if not shuffle:
        return offsets
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        rows[inside] = epoch_order(num_samples, seed=seed, epoch=int(epoch))[offsets[inside]]
    return rows


def training_batches(
    num_samples: int,
    layout: BatchLayout,
    *,
    consumed_samples: int,
    seed: int,
    shuffle: bool,
    unit: str = "samples",
    order: Callable[..., np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Yields global batches without end: sample indices int64 [global_batch_size], the first after `consumed_samples`.

    Args:
        num_samples: Samples in the dataset.
        layout: How batches are dealt.
        consumed_samples: Where to begin.
        seed: Seed of the order.
        shuffle: Whether each epoch has a new order.
        unit: What the error calls the samples.
        order: Called as `sample_indices`, without `num_samples`. None: epochs of the dataset.

    Raises:
        ValueError: There are fewer samples than one global batch takes.
    """
    if num_samples < layout.global_batch_size:
        raise ValueError(
            f"the training data has {num_samples} {unit}, fewer than one global batch "
            f"(train.global_batch_size={layout.global_batch_size}): add samples or lower train.global_batch_size"
        )
    order = order or partial(sample_indices, num_samples=num_samples)
    return _endless_batches(consumed_samples, layout.global_batch_size, partial(order, seed=seed, shuffle=shuffle))


def _endless_batches(start: int, size: int, order: Callable[[int, int], np.ndarray]) -> Iterator[np.ndarray]:
    while True:
        yield order(start, size)
        start += size


def evaluation_batches(
    num_samples: int, layout: BatchLayout, *, max_batches: int | None = None, micro_batches_at_once: int = 1
) -> list[np.ndarray]:
    """Returns the global batches of one pass: every sample once, in order, filled up with PADDING_ROW.

    The last batch may have fewer rows than `global_batch_size`, but always whole micro-batches for every rank.

    Args:
        num_samples: Samples in the dataset.
        layout: How batches are dealt.
        max_batches: Stop after this many batches. None: cover all samples.
        micro_batches_at_once: Each rank's micro-batches of a batch are a multiple of this, or a full batch's.
    """
    multiple = layout.rows_at_once * micro_batches_at_once
    batches = []
    for start in range(0, num_samples, layout.global_batch_size)[:max_batches]:
        rows = np.arange(start, min(start + layout.global_batch_size, num_samples), dtype=np.int64)
        size = min(-(-len(rows) // multiple) * multiple, layout.global_batch_size)
        missing = size - len(rows)
        batches.append(np.concatenate([rows, np.full(missing, PADDING_ROW, dtype=np.int64)]))
    return batches
