# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Supervised finetuning data: JSONL lines tokenised once, up front, into arrays.

A sample of L tokens has S = L - 1 positions: `tokens` are the first S, `labels` the last S, and `loss_mask` is 1.0
where the label is a learned token. S is at most `seq_length`.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron.bridge.data.config import SFTOptions
from megatron.bridge.data.formats import RenderedSample, SampleFormat, Span, choose_format
from megatron.bridge.data.jsonl import read_rows
from megatron.bridge.data.tokenizer import Offsets, Tokenizer

logger = logging.getLogger(__name__)

LINES_PER_BATCH = 1000


@dataclass(frozen=True)
class DataReport:
    """What became of one JSONL file; tokens count input positions."""

    path: str
    samples: int
    tokens: int
    learned_tokens: int
    truncated: int
    dropped: int
    longest: int

    def __str__(self) -> str:
        mean = self.tokens / self.samples if self.samples else 0.0
        return (
            f"{self.path}: {self.samples} samples, {self.tokens} tokens ({mean:.1f} on average, longest "
            f"{self.longest}), {self.learned_tokens} learned; {self.truncated} truncated, {self.dropped} dropped"
        )


@dataclass(frozen=True)
class TokenisedSample:
    """One sample as arrays of one length: token ids (int32) and which of them are learned (bool)."""

    ids: np.ndarray
    learned: np.ndarray
    truncated: bool


class SFTDataset(Dataset):
    """Tokenised samples, kept in two flat arrays.

    Attributes:
        lengths: Positions S of each sample, int64 [number of samples].
        report: Figures of the file.
    """

    def __init__(self, samples: list[TokenisedSample], report: DataReport) -> None:
        """Joins the samples' arrays."""
        sizes = np.array([len(sample.ids) for sample in samples], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._ids = np.concatenate([sample.ids for sample in samples])
        self._learned = np.concatenate([sample.learned for sample in samples])
        self.lengths = sizes - 1
        self.report = report

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns tokens and labels (int64) and loss_mask (float32), each [S], on the host."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ids = torch.from_numpy(self._ids[self._starts[index] : self._starts[index + 1]].astype(np.int64))
        learned = torch.from_numpy(self._learned[self._starts[index] + 1 : self._starts[index + 1]].astype(np.float32))
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": learned}


def load_sft_dataset(
    path: str | Path,
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    options: SFTOptions,
    max_samples: int | None = None,
    show_progress: bool = False,
) -> SFTDataset:
    """Reads and tokenises a JSONL file.

    A sample of more than `seq_length` positions is shortened: an input/output sample first in its truncation field,
    and only if that does not suffice at the end of its answer (then no EOS follows); a conversation at its end. A
    sample without a learned token is dropped.

    Args:
        path: The file.
        tokenizer: As made by `build_tokenizer`.
        seq_length: Most positions of a sample.
        options: Format of the lines.
        max_samples: Keep only this many of the first samples. None: all.
        show_progress: Whether to draw a progress bar for a big file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, a line has not the format, or no sample is left.
    """
    rows = read_rows(path, show_progress=show_progress)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} is empty: expected one JSON object a line")
    sample_format = choose_format(first[1], options, tokenizer)
    encoder = _SampleEncoder(tokenizer, sample_format, seq_length=seq_length, options=options)
    samples: list[TokenisedSample] = []
    dropped = 0
    for sample in _tokenise(chain([first], rows), path=path, encoder=encoder):
        if sample is None:
            dropped += 1
            continue
        samples.append(sample)
        if len(samples) == max_samples:
            break
    if not samples:
        raise ValueError(
            f"{path}: none of its {dropped} samples has an answer token within seq_length={seq_length}: "
            "raise seq_length or add answers"
        )
    report = DataReport(
        path=str(path),
        samples=len(samples),
        tokens=sum(len(sample.ids) - 1 for sample in samples),
        learned_tokens=sum(int(sample.learned[1:].sum()) for sample in samples),
        truncated=sum(sample.truncated for sample in samples),
        dropped=dropped,
        longest=max(len(sample.ids) - 1 for sample in samples),
    )
    return SFTDataset(samples, report)


def _tokenise(
    rows: Iterable[tuple[int, dict[str, Any]]], *, path: str | Path, encoder: "_SampleEncoder"
) -> Iterator[TokenisedSample | None]:
    """Yields the tokenised sample of each row in order, None for one without a learned token."""
    rows = iter(rows)
    while batch := list(islice(rows, LINES_PER_BATCH)):
        rendered: list[RenderedSample | None] = []
        for number, row in batch:
            try:
                rendered.append(encoder.render(row))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        try:
            encoded = encoder.encode(rendered)
        except ValueError:
            for (number, _), sample in zip(batch, rendered, strict=True):
                try:
                    encoder.encode([sample])
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from error
            raise
        yield from encoded


class _SampleEncoder:
    """Renders rows and turns rendered samples into tokens within the length limit."""

    def __init__(
        self, tokenizer: Tokenizer, sample_format: SampleFormat, *, seq_length: int, options: SFTOptions
    ) -> None:
        self.tokenizer = tokenizer
        self.format = sample_format
        self.max_tokens = seq_length + 1
        self.cuts_left = options.truncation_method == "left"
        self.special_ids = tokenizer.special_ids
        for name, wanted, token in (
            ("add_bos", sample_format.adds_bos, tokenizer.bos_id),
            ("add_eos", sample_format.adds_eos, tokenizer.eos_id),
        ):
            if wanted and token is None:
                raise ValueError(
                    f"dataset.dataset_kwargs.{name}=true, but tokenizer {tokenizer.name} has no such token"
                )
        self.prefix = [tokenizer.bos_id] if sample_format.adds_bos else []
        self.suffix = [tokenizer.eos_id] if sample_format.adds_eos else []

    def render(self, row: dict[str, Any]) -> RenderedSample | None:
        """Renders one row; ValueError if it has not the format or is no valid text."""
        sample = self.format.render(row)
        if sample is not None:
            try:
                sample.text.encode("utf-8")
            except UnicodeEncodeError as error:
                character = sample.text[error.start]
                raise ValueError(f"the text holds {character!r}, half a character: remove or replace it") from error
        return sample

    def encode(self, rendered: list[RenderedSample | None]) -> list[TokenisedSample | None]:
        """Returns the tokens of each sample, None where nothing is learned."""
        present = [sample for sample in rendered if sample is not None]
        encoded = iter(self.tokenizer.encode_batch([sample.text for sample in present]) if present else [])
        return [None if sample is None else self._fit(sample, *next(encoded)) for sample in rendered]

    def _fit(self, sample: RenderedSample, ids: list[int], offsets: Offsets) -> TokenisedSample | None:
        """Applies masks, BOS and EOS and the length limit to one sample."""
        tokens = np.array(ids, dtype=np.int32)
        spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        learned = self._learned_tokens(sample, tokens, spans)
        excess = len(self.prefix) + len(tokens) + len(self.suffix) - self.max_tokens
        truncated = excess > 0
        if truncated:
            keep = self._shorten(sample, spans, excess)
            tokens, learned = tokens[keep], learned[keep]
        tokens = np.concatenate([self.prefix, tokens, self.suffix]).astype(np.int32)[: self.max_tokens]
        marks = [[False] * len(self.prefix), learned, [True] * len(self.suffix)]
        learned = np.concatenate(marks).astype(bool)[: self.max_tokens]
        return TokenisedSample(tokens, learned, truncated) if learned[1:].any() else None

    def _learned_tokens(self, sample: RenderedSample, tokens: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Marks the tokens that stand for learned characters, each turn up to its end token."""
        learned = np.zeros(len(tokens), dtype=bool)
        for span in sample.learned:
            chosen = _tokens_in(spans, span)
            # "<|im_end|>\n": generation stops at the end token, so the line break after it is not learned.
            last = len(chosen)
            while last > 1 and sample.text[slice(*spans[chosen[last - 1]])].isspace():
                last -= 1
            if last and int(tokens[chosen[last - 1]]) in self.special_ids:
                chosen = chosen[:last]
            learned[chosen] = True
        return learned

    def _shorten(self, sample: RenderedSample, spans: np.ndarray, excess: int) -> np.ndarray:
        """Returns which tokens to keep after cutting up to `excess` tokens out of the cuttable spans."""
        keep = np.ones(len(spans), dtype=bool)
        for start, end in sample.cuttable:
            inside = np.flatnonzero((spans[:, 0] >= start) & (spans[:, 1] <= end) & keep)
            cut = inside[:excess] if self.cuts_left else inside[max(0, len(inside) - excess) :]
            keep[cut] = False
            excess -= len(cut)
        return keep


def _tokens_in(spans: np.ndarray, span: Span) -> np.ndarray:
    """Returns the indices of the tokens that stand for at least one character of `span`.

    A token across the span's start counts: its last characters would otherwise never be learned. A token of no
    characters counts where it stands.
    """
    ends = np.maximum(spans[:, 1], spans[:, 0] + 1)
    return np.flatnonzero((ends > span[0]) & (spans[:, 0] < span[1]))
