# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Samples as rows of one length, and rows as a micro-batch."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from megatron.bridge.data.sampler import PADDING_ROW, BatchLayout
from megatron.bridge.data.sft_options import check_positive

MicroBatch: TypeAlias = dict[str, Any]
"""Tensors by name; `attention_mask` may be None."""


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


class PaddedRows(Dataset):
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
    """Returns the sample with `length` positions: what is added is `pad_id` at position 0, with loss_mask 0.

    Args:
        sample: tokens, labels, loss_mask and perhaps position_ids, each [S] with S at most `length`.
        length: Length of the result.
        pad_id: Token that fills up `tokens` and `labels`.
    """
    size = len(sample["tokens"])
    tokens = torch.full((length,), pad_id, dtype=torch.int64)
    labels = torch.full((length,), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(length, dtype=torch.float32)
    position_ids = torch.zeros(length, dtype=torch.int64)  # padding makes no sample longer
    tokens[:size] = sample["tokens"]
    labels[:size] = sample["labels"]
    loss_mask[:size] = sample["loss_mask"]
    position_ids[:size] = sample["position_ids"] if "position_ids" in sample else torch.arange(size)
    row = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    return row | {"cu_seqlens": sample["cu_seqlens"]} if "cu_seqlens" in sample else row


def stack_rows(rows: list[dict[str, torch.Tensor]]) -> MicroBatch:
    """Joins rows of one length to a micro-batch; one with fewer samples than another repeats the length at its end."""
    ends = [row.pop("cu_seqlens", None) for row in rows]
    batch: MicroBatch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if any(end is not None for end in ends):
        length = batch["tokens"].shape[1]
        whole = torch.tensor([0, length], dtype=torch.int32)
        filled = [whole if end is None else end for end in ends]
        batch["cu_seqlens"] = pad_sequence(filled, batch_first=True, padding_value=length)
    return batch | {"attention_mask": None}
