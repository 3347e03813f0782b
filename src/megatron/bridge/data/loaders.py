# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Datasets and the batches made of them.

A micro-batch is a dict of host tensors: `tokens`, `labels` (shifted), `position_ids` (int64) and `loss_mask`
(float32), each [B, S], and `attention_mask` None (causal). Packed rows have `cu_seqlens` too, [B, N + 1] int32: 0, the
end of each sample, and S where a row has fewer than N samples. S follows from the samples of the whole global batch,
so that all its micro-batches are alike on every rank, or from those of each micro-batch. Nothing here asks another
rank: ranks of one data-parallel rank make identical batches.
"""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from megatron.bridge.data.blends import build_blended_datasets
from megatron.bridge.data.config import DatasetBuildContext, DatasetProvider, GPTDatasetConfig, GPTSFTDatasetConfig
from megatron.bridge.data.sampler import PADDING_ROW, BatchLayout, evaluation_batches, training_batches
from megatron.bridge.data.sft_datasets import build_sft_datasets
from megatron.bridge.data.sft_options import check_positive
from megatron.bridge.utils.device import current_device, is_simulated

MicroBatch: TypeAlias = dict[str, Any]
"""Tensors by name; `attention_mask` may be None."""
Datasets = tuple[Any | None, Any | None, Any | None]
DatasetConfig = GPTSFTDatasetConfig | GPTDatasetConfig | DatasetProvider


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How rows become one length.

    Attributes:
        seq_length: Longest row; also the length of rows of a dataset that does not tell its samples' lengths.
        multiple_of: Lengths are rounded up to a multiple of this, but not beyond `seq_length`.
        to_full_length: Whether every row gets `seq_length`.
        per_micro_batch: Whether each micro-batch has a length of its own, which saves padding; pipeline stages, which
            must know the length beforehand, need one length for the whole global batch.
        pad_id: Token that fills up `tokens` and `labels`; never learned.
    """

    seq_length: int
    multiple_of: int = 16
    to_full_length: bool = False
    per_micro_batch: bool = False
    pad_id: int = 0

    def __post_init__(self) -> None:
        check_positive("seq_length", self.seq_length)
        check_positive("multiple_of", self.multiple_of)

    def row_length(self, rows: np.ndarray, lengths: np.ndarray | None) -> int:
        """Returns the length S of a batch with samples `rows` (PADDING_ROW for none)."""
        if lengths is None or self.to_full_length:
            return self.seq_length
        longest = int(lengths[rows[rows != PADDING_ROW]].max(initial=1))
        return min(-(-longest // self.multiple_of) * self.multiple_of, self.seq_length)


def padding_for(
    config: DatasetConfig, tokenizer: Any, *, seq_length: int, divisor: int = 1, per_micro_batch: bool = False
) -> Padding:
    """Returns the padding that `config` asks for.

    Args:
        config: The dataset's configuration.
        tokenizer: As made by `build_tokenizer`.
        seq_length: The model's sequence length.
        divisor: What each S must be a multiple of (sequence and context parallel sizes).
        per_micro_batch: See `Padding`.

    Raises:
        ValueError: `seq_length` is not a multiple of `divisor`.
    """
    if seq_length % divisor:
        raise ValueError(f"seq_length={seq_length} is not a multiple of {divisor}, the parallel sizes that share it")
    if not isinstance(config, GPTSFTDatasetConfig):
        return Padding(
            seq_length=seq_length,
            multiple_of=int(np.lcm(16, divisor)),
            per_micro_batch=per_micro_batch,
            pad_id=tokenizer.pad_id,
        )
    options = config.options
    return Padding(
        seq_length=seq_length,
        multiple_of=int(np.lcm(options.pad_seq_length_to_mult, divisor)),
        to_full_length=options.pad_to_max_length,
        per_micro_batch=per_micro_batch,
        pad_id=tokenizer.pad_id,
    )


def build_datasets(config: DatasetConfig, context: DatasetBuildContext) -> Datasets:
    """Builds the training, validation and test datasets; None for one that is not wanted.

    Must be called on all ranks. An error in reading JSONL files ends all of them.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The configuration or a file cannot be used.
    """
    if not isinstance(config, GPTSFTDatasetConfig | GPTDatasetConfig | DatasetProvider):
        raise ValueError(
            f"dataset is a {type(config).__name__}: expected GPTSFTDatasetConfig, GPTDatasetConfig, "
            "MockGPTDatasetConfig or a DatasetProvider"
        )
    config.finalize()
    if isinstance(config, GPTSFTDatasetConfig):
        is_blend = config.blend is not None or config.blend_per_split is not None
        return build_blended_datasets(config, context) if is_blend else build_sft_datasets(config, context)
    if isinstance(config, GPTDatasetConfig):
        from megatron.bridge.data.gpt import build_gpt_datasets

        return build_gpt_datasets(config, context)
    datasets = config.build_datasets(context)
    if not isinstance(datasets, tuple | list) or len(datasets) != 3:
        name = type(config).__name__
        raise ValueError(
            f"{name}.build_datasets returned {type(datasets).__name__}: expected a tuple of three datasets"
        )
    training, validation, test = datasets
    return training, validation, test


def build_step_iterator(
    dataset: Any,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    seed: int,
    shuffle: bool,
    padding: Padding,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[MicroBatch]]:
    """Returns an endless iterator over training steps: this rank's micro-batches of each global batch.

    Args:
        dataset: Map-style; see `DatasetProvider` for its items.
        consumed_samples: Samples that all ranks together have trained on already.
        micro_batch_size: Rows of one micro-batch.
        global_batch_size: Rows of one step, over all data-parallel ranks.
        data_parallel_rank: This rank, within its data-parallel group.
        data_parallel_size: Size of that group.
        seed: Seed of the order.
        shuffle: Whether samples come in a new order each epoch.
        padding: How rows become one length.
        num_workers: Processes that read ahead; 0 reads in this process.
        pin_memory: Whether to put batches in page-locked memory, where there is a GPU.

    Raises:
        ValueError: The sizes don't divide, or there are fewer samples than one global batch takes.
    """
    if dataset is None:
        raise ValueError("there is no training data: build_datasets gave None for it")
    layout = BatchLayout(
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    batches = training_batches(
        len(dataset),
        layout,
        consumed_samples=consumed_samples,
        seed=seed,
        shuffle=shuffle,
        unit=unit_of(dataset),
        order=getattr(dataset, "training_order", None),
    )
    rows = _PaddedRows(dataset, padding)
    steps = (rows.keys_of_step(batch, layout) for batch in batches)
    return _load_steps(rows, steps, num_workers=num_workers, pin_memory=pin_memory)


def unit_of(dataset: Any) -> str:
    """What messages call the items of a dataset."""
    return "packs" if getattr(dataset, "is_packed", False) else "samples"


def build_iterator(dataset: Any, **arguments: Any) -> Iterator[MicroBatch]:
    """Returns an endless iterator over this rank's micro-batches; arguments as for `build_step_iterator`."""
    return chain.from_iterable(build_step_iterator(dataset, **arguments))


class EvaluationSteps:
    """One pass over a dataset, each sample once over all data-parallel ranks; may be iterated again and again.

    Iterating yields this rank's micro-batches of each global batch as a list. Every rank gets lists of the same
    lengths; rows that only fill up the last batch have `loss_mask` 0.
    """

    def __init__(
        self,
        dataset: Any,
        layout: BatchLayout,
        *,
        padding: Padding,
        max_batches: int | None = None,
        micro_batches_at_once: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Plans the pass.

        Args:
            dataset: Map-style; see `DatasetProvider` for its items.
            layout: How batches are dealt to ranks.
            padding: How rows become one length.
            max_batches: Stop after this many global batches. None: cover all samples.
            micro_batches_at_once: See `evaluation_batches`.
            num_workers: Processes that read ahead; 0 reads in this process.
            pin_memory: Whether to put batches in page-locked memory, where there is a GPU.

        Raises:
            ValueError: The dataset is empty.
        """
        if len(dataset) == 0:
            raise ValueError("the evaluation data has no samples: add some or switch the evaluation off")
        self._rows = _PaddedRows(dataset, padding)
        self._layout = layout
        self._batches = evaluation_batches(
            len(dataset), layout, max_batches=max_batches, micro_batches_at_once=micro_batches_at_once
        )
        self._loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    @property
    def num_samples(self) -> int:
        """Samples of one pass over all ranks, padding rows not counted."""
        return sum(int((batch != PADDING_ROW).sum()) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        steps = [self._rows.keys_of_step(batch, self._layout) for batch in self._batches]
        return _load_steps(self._rows, steps, **self._loading)


def build_evaluation_steps(
    dataset: Any,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    **arguments: Any,
) -> EvaluationSteps:
    """Returns `EvaluationSteps` of `dataset`; sizes as for `build_step_iterator`, the rest as for the class."""
    layout = BatchLayout(
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    return EvaluationSteps(dataset, layout, **arguments)


class _PaddedRows(Dataset):
    """A dataset of rows of a given length; a key is (sample index or PADDING_ROW, row length)."""

    def __init__(self, dataset: Any, padding: Padding) -> None:
        self.dataset = dataset
        self.padding = padding
        lengths = getattr(dataset, "lengths", None)
        self.lengths = None if lengths is None else np.asarray(lengths, dtype=np.int64)

    def keys_of_step(self, batch: np.ndarray, layout: BatchLayout) -> list[list[tuple[int, int]]]:
        """Returns the keys of this rank's micro-batches of one global batch."""
        micro_batches = layout.rank_slice(batch)
        if not self.padding.per_micro_batch:
            length = self.padding.row_length(batch, self.lengths)
            return [[(int(row), length) for row in rows] for rows in micro_batches]
        return [[(int(row), self.padding.row_length(rows, self.lengths)) for row in rows] for rows in micro_batches]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        index, length = key
        if index == PADDING_ROW:
            sample = {name: torch.zeros(0) for name in ("tokens", "labels", "loss_mask")}
        else:
            sample = self.dataset[index]
            self._check(sample, index, length)
        return pad_sample(sample, length, pad_id=self.padding.pad_id)

    def _check(self, sample: Any, index: int, length: int) -> None:
        where = f"sample {index} of {type(self.dataset).__name__}"
        for name in ("tokens", "labels", "loss_mask"):
            if not isinstance(sample, dict) or not torch.is_tensor(sample.get(name)):
                found = ", ".join(sample) if isinstance(sample, dict) else type(sample).__name__
                raise ValueError(f"{where} has no tensor {name!r} (found: {found}): expected a dict of 1-D tensors")
            if sample[name].dim() != 1 or len(sample[name]) != len(sample["tokens"]):
                shape = list(sample[name].shape)
                raise ValueError(
                    f"{where}: {name} has shape {shape}, expected [{sample['tokens'].numel()}] like tokens"
                )
        if len(sample["tokens"]) > length:
            raise ValueError(
                f"{where} has {len(sample['tokens'])} tokens, expected at most {length}: shorten it, correct the "
                "dataset's lengths or raise seq_length"
            )


def pad_sample(sample: dict[str, torch.Tensor], length: int, *, pad_id: int) -> dict[str, torch.Tensor]:
    """Returns the sample with `length` positions: what is added is `pad_id`, with loss_mask 0.

    Args:
        sample: tokens, labels, loss_mask and perhaps position_ids, each [S] with S at most `length`.
        length: Length of the result.
        pad_id: Token that fills up `tokens` and `labels`.
    """
    size = len(sample["tokens"])
    tokens = torch.full((length,), pad_id, dtype=torch.int64)
    labels = torch.full((length,), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(length, dtype=torch.float32)
    position_ids = torch.arange(length, dtype=torch.int64)
    tokens[:size] = sample["tokens"]
    labels[:size] = sample["labels"]
    loss_mask[:size] = sample["loss_mask"]
    if "position_ids" in sample:
        position_ids[:size] = sample["position_ids"]
    row = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    return row | {"cu_seqlens": sample["cu_seqlens"]} if "cu_seqlens" in sample else row


def _stack_rows(rows: list[dict[str, torch.Tensor]]) -> MicroBatch:
    """Joins rows of one length to a micro-batch; a row with fewer samples than another repeats the length at its end."""
    ends = [row.pop("cu_seqlens", None) for row in rows]
    batch: MicroBatch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if any(end is not None for end in ends):
        length = batch["tokens"].shape[1]
        whole = torch.tensor([0, length], dtype=torch.int32)
        filled = [whole if end is None else end for end in ends]
        batch["cu_seqlens"] = pad_sequence(filled, batch_first=True, padding_value=length)
    return batch | {"attention_mask": None}


def _take_signals_as_the_run_does(_: int) -> None:
    """In a worker: ignore SIGTERM if the run catches it. By default torch ends the worker, and with it the run.

    torchrun and schedulers also send the signal to the workers, whose batch is needed for the last step before the
    save.
    """
    handler = signal.getsignal(signal.SIGTERM)  # forked: the run's
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _load_steps(
    rows: _PaddedRows, steps: Iterable[list[list[tuple[int, int]]]], *, num_workers: int, pin_memory: bool
) -> Iterator[list[MicroBatch]]:
    """Yields the micro-batches of each step; a step is a list of micro-batches' keys."""
    sizes: list[int] = []

    def micro_batch_keys() -> Iterator[list[tuple[int, int]]]:
        for step in steps:
            sizes.append(len(step))
            yield from step

    loader = DataLoader(
        rows,
        batch_sampler=micro_batch_keys(),
        collate_fn=_stack_rows,
        num_workers=num_workers,
        pin_memory=pin_memory and not is_simulated() and current_device().type != "cpu",
        worker_init_fn=_take_signals_as_the_run_does,
        # Its own generator: without one, the loader draws from the run's random numbers.
        generator=torch.Generator(device="cpu").manual_seed(0),
    )
    loaded: list[MicroBatch] = []
    for micro_batch in loader:
        loaded.append(micro_batch)
        if len(loaded) == sizes[0]:
            yield loaded
            loaded = []
            sizes.pop(0)
