# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A PyTorch `DataLoader` over any map-style dataset, in the order in which a run takes its samples.

A run itself uses `loaders.py`, which also pads the rows of a global batch alike.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from megatron.bridge.data.sampler import BatchLayout, sample_indices
from megatron.bridge.utils.device import current_device, is_simulated

__all__ = ["RankBatchSampler", "build_pretraining_data_loader"]

_ORDERS = ("single", "cyclic", "batch")


class RankBatchSampler(Sampler[list[int]]):
    """This rank's rows of each micro-batch, or of each global batch.

    "single" goes once through the samples in their order. "cyclic" and "batch" have no end, and shuffle each epoch.
    """

    def __init__(
        self,
        num_samples: int,
        layout: BatchLayout,
        *,
        consumed_samples: int,
        dataloader_type: str,
        drop_last: bool = True,
        seed: int = 1234,
    ) -> None:
        """Plans the order.

        Args:
            num_samples: Samples in the dataset.
            layout: How a global batch is dealt to ranks.
            consumed_samples: Samples that all ranks together have taken already.
            dataloader_type: "single", "cyclic" or "batch"; "batch" yields the rows of whole global batches.
            drop_last: Whether "single" leaves out the samples at the end that don't fill a batch of all ranks.
            seed: Seed of the order.

        Raises:
            ValueError: There are no samples, or "single" has none left.
        """
        if num_samples < 1:
            raise ValueError("the dataset has no samples: expected at least one")
        if dataloader_type == "single" and consumed_samples >= num_samples:
            raise ValueError(f"{consumed_samples} samples are consumed already, of {num_samples}: none are left")
        self.num_samples, self.layout, self.consumed_samples = num_samples, layout, consumed_samples
        self.dataloader_type, self.drop_last, self.seed = dataloader_type, drop_last, seed

    def __iter__(self) -> Iterator[list[int]]:
        size = self.layout.global_batch_size if self.dataloader_type == "batch" else self.layout.rows_at_once
        start = self.consumed_samples
        while True:
            is_single = self.dataloader_type == "single"
            count = min(size, self.num_samples - start) if is_single else size
            if count <= 0 or (count < size and self.drop_last):
                return
            rows = sample_indices(start, count, num_samples=self.num_samples, seed=self.seed, shuffle=not is_single)
            share = self._of_this_rank(rows)
            if len(share):
                yield share.tolist()
            start += count

    def __len__(self) -> int:
        if self.dataloader_type != "single":
            raise TypeError(f"a loader of dataloader_type={self.dataloader_type!r} has no end, and no length")
        left, size = self.num_samples - self.consumed_samples, self.layout.rows_at_once
        if self.drop_last or left % size == 0:
            return left // size
        begins = self.layout.data_parallel_rank * self.layout.micro_batch_size
        return left // size + (left % size > begins)

    def _of_this_rank(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) % self.layout.rows_at_once == 0:
            return self.layout.rank_slice(rows).reshape(-1)
        begins = self.layout.data_parallel_rank * self.layout.micro_batch_size
        return rows[begins : begins + self.layout.micro_batch_size]


def build_pretraining_data_loader(
    dataset: Any,
    consumed_samples: int,
    dataloader_type: str,
    micro_batch_size: int,
    num_workers: int = 0,
    data_sharding: bool = True,
    worker_init_fn: Callable[[int], None] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = True,
    persistent_workers: bool = False,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    drop_last: bool = True,
    global_batch_size: int | None = None,
    seed: int = 1234,
) -> Any:
    """A loader that yields this rank's batches, from the samples consumed on.

    Args:
        dataset: Map-style. None: there is no loader.
        consumed_samples: Samples that all ranks together have taken already.
        dataloader_type: "single": once, in the stored order. "cyclic": without end, shuffled each epoch. "batch": as
            that, but each item holds this rank's rows of a whole global batch. "external": the dataset is a loader
            already.
        micro_batch_size: Rows of an item, except for "batch".
        num_workers: Processes that read ahead; 0 reads in this process.
        data_sharding: Has no effect: which samples a batch holds doesn't depend on the number of ranks.
        worker_init_fn: Called in each of the processes with its number.
        collate_fn: Joins rows to a batch. None: the dataset's own `collate_fn`, or PyTorch's default.
        pin_memory: Whether to put batches in page-locked memory, where there is a GPU.
        persistent_workers: Whether the processes live on after a pass.
        data_parallel_rank: This rank, within its data-parallel group.
        data_parallel_size: Size of that group.
        drop_last: For "single": leave out the samples at the end that don't fill a batch of all ranks.
        global_batch_size: Rows over all ranks; needed for "batch".
        seed: Seed of the order.

    Returns:
        A `torch.utils.data.DataLoader`; None without a dataset; the dataset itself for "external".

    Raises:
        ValueError: Another type, sizes that don't divide, or no samples that are left.
    """
    if dataset is None or dataloader_type == "external":
        return dataset
    if dataloader_type not in _ORDERS:
        raise ValueError(f"dataloader_type={dataloader_type!r}: expected {', '.join(_ORDERS)} or external")
    if dataloader_type == "batch" and global_batch_size is None:
        raise ValueError("dataloader_type='batch' needs global_batch_size, the rows over all ranks")
    layout = BatchLayout(
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size or micro_batch_size * data_parallel_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    sampler = RankBatchSampler(
        len(dataset),
        layout,
        consumed_samples=consumed_samples,
        dataloader_type=dataloader_type,
        drop_last=drop_last,
        seed=seed,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory and _pins(),
        collate_fn=collate_fn or getattr(dataset, "collate_fn", None),
        worker_init_fn=worker_init_fn,
        persistent_workers=persistent_workers and num_workers > 0,
    )


def _pins() -> bool:
    return not is_simulated() and current_device().type != "cpu"
