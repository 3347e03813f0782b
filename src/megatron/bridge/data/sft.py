# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Supervised finetuning data: JSONL lines tokenised once, up front, into arrays.

A sample of L tokens has S = L - 1 positions: `tokens` are the first S, `labels` the last S, and `loss_mask` is 1.0
where the label is a learned token. S is at most `seq_length`.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron.bridge.data.cache import cache_file, read_cache, write_cache
from megatron.bridge.data.encoding import NO_LEARNED_TOKEN, SampleEncoder, TokenisedSample, encode_all
from megatron.bridge.data.formats import choose_format
from megatron.bridge.data.row_notes import NoteCount, NoteCounter, read_counts, shown
from megatron.bridge.data.same_data import check_same_on_all_ranks
from megatron.bridge.data.sft_options import SFTOptions
from megatron.bridge.data.sources import JsonlSource, Source
from megatron.bridge.data.tokenizer import Tokenizer
from megatron.bridge.utils.distributed import (
    all_gathered,
    is_rank_0,
    local_rank,
    raise_on_all_ranks,
    run_while_others_wait,
)

logger = logging.getLogger(__name__)

ARRAYS = ("ids", "learned", "starts")


@dataclass(frozen=True)
class DataReport:
    """Result of tokenising one file. Tokens are counted as input positions; `first_...` are numbers of rows."""

    path: str
    samples: int
    tokens: int
    learned_tokens: int
    truncated: int
    dropped: int
    longest: int
    first_truncated: int | None = None
    first_dropped: int | None = None
    notes: tuple[NoteCount, ...] = ()

    @classmethod
    def read(cls, stored: dict[str, Any], *, path: str) -> "DataReport":
        """The report that `asdict` made plain data of, on a file that may lie elsewhere now."""
        return cls(**{**stored, "path": path, "notes": read_counts(stored["notes"])})

    @property
    def warnings(self) -> list[str]:
        """A line for each thing that the user should know before training."""
        return [f"{self.path}: {note.warning}" for note in self.notes if note.advice]

    def __str__(self) -> str:
        mean = self.tokens / self.samples if self.samples else 0.0
        truncated = f"{self.truncated} truncated{_first(self.first_truncated)}"
        dropped = f"{self.dropped} dropped{_first(self.first_dropped)}"
        notes = f"; {shown(self.notes)}" if self.notes else ""
        return (
            f"{self.path}: {self.samples} samples, {self.tokens} tokens ({mean:.1f} on average, longest "
            f"{self.longest}), {self.learned_tokens} learned; {truncated}, {dropped}{notes}"
        )


def _first(number: int | None) -> str:
    return "" if number is None else f" (the first in line {number})"


class SFTDataset(Dataset):
    """Tokenised samples, kept in flat arrays.

    Attributes:
        arrays: `ids` (int32) and `learned` (bool) of all samples in a row, and `starts` (int64 [N + 1]).
        lengths: Positions S of each sample, int64 [number of samples].
        report: Figures of the file.
    """

    def __init__(self, arrays: dict[str, np.ndarray], report: DataReport, rows: np.ndarray | None = None) -> None:
        """Takes the arrays.

        Args:
            arrays: See above.
            report: Figures of the file.
            rows: Only these samples. None: all.
        """
        self.arrays = arrays
        self._starts, self._ends = arrays["starts"][:-1], arrays["starts"][1:]
        if rows is not None:
            self._starts, self._ends = self._starts[rows], self._ends[rows]
        self.lengths = self._ends - self._starts - 1
        self.report = report

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns tokens and labels (int64) and loss_mask (float32), each [S], on the host."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = self._starts[index], self._ends[index]
        ids = torch.from_numpy(self.arrays["ids"][start:end].astype(np.int64))
        learned = torch.from_numpy(self.arrays["learned"][start + 1 : end].astype(np.float32))
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": learned}

    def part(self, rows: np.ndarray) -> "SFTDataset":
        """Returns a dataset of those samples, on the same arrays."""
        return SFTDataset(self.arrays, self.report, rows)


def load_sft_dataset(
    source: str | Path | Source,
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    options: SFTOptions,
    max_samples: int | None = None,
    num_processes: int = 1,
    cache_directory: str | Path | None = None,
    limit: str = "seq_length",
) -> SFTDataset:
    """Reads and tokenises a file, or takes its tokens from the cache. Call on all ranks; an error ends all of them.

    A sample of more than `seq_length` positions is shortened: an input/output sample first in its truncation field,
    and only if that does not suffice at the end of its answer (then no EOS follows); a conversation at its end. A
    sample without a learned token is dropped.

    Args:
        source: A JSONL file's path, or another source.
        tokenizer: As made by `build_tokenizer`.
        seq_length: Most positions of a sample.
        options: Format of the lines.
        max_samples: Keep only this many of the first samples. None: all.
        num_processes: See `encode_all`.
        cache_directory: Where the first process of each machine keeps the tokens for the others and for later runs.
            None: every process tokenises for itself.
        limit: The option that `seq_length` comes from, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, a line has not the format, no sample is left, or the ranks' samples differ.
        RuntimeError: Another rank failed; its error's text.
    """
    source = JsonlSource(source) if isinstance(source, str | Path) else source
    recipe: dict[str, Any] = {"seq_length": seq_length, "max_samples": max_samples, "options": asdict(options)}
    recipe |= {"tokenizer": tokenizer.fingerprint, "limit": limit}

    def make() -> SFTDataset:
        return tokenise(
            source,
            tokenizer,
            seq_length=seq_length,
            options=options,
            max_samples=max_samples,
            num_processes=num_processes,
            limit=limit,
        )

    if cache_directory is None:
        with raise_on_all_ranks(f"reading {source}"):
            dataset = make()
    else:
        dataset = _through_cache(cache_file(cache_directory, source.label, recipe), source, recipe, make)
    check_same_on_all_ranks((dataset.arrays[name] for name in ARRAYS), str(source))
    return dataset


def _through_cache(path: Path, source: Source, recipe: dict[str, Any], make: Callable[[], SFTDataset]) -> SFTDataset:
    """Takes the tokens from a cache file, which the first process of each machine makes if it isn't there."""

    def kept(digest: str) -> SFTDataset | None:
        found = read_cache(path, ARRAYS, recipe={**recipe, "source": digest})
        return found and SFTDataset(found[0], DataReport.read(found[1], path=str(source)))

    def prepare() -> tuple[str, SFTDataset]:
        digest = source.digest()
        dataset = kept(digest)
        if dataset is None:
            dataset = make()
            write_cache(path, dataset.arrays, recipe={**recipe, "source": digest}, report=asdict(dataset.report))
        else:
            logger.info("%s: its tokens are taken from %s", source, path)
        return digest, dataset

    tokenises = local_rank() == 0 or is_rank_0()
    own = run_while_others_wait(prepare if tokenises else None, doing=f"reading {source}")
    digest = next(digest for digest in all_gathered(own and own[0]) if digest)
    with raise_on_all_ranks(f"reading {source}"):
        return own[1] if own else kept(digest) or make()


def tokenise(
    source: Source,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    options: SFTOptions,
    max_samples: int | None = None,
    num_processes: int = 1,
    limit: str = "seq_length",
) -> SFTDataset:
    """As `load_sft_dataset` without a cache, on this rank alone."""
    rows = source.rows(show_progress=is_rank_0())
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty: expected {source.expected}")
    sample_format = choose_format(first[1], options, tokenizer)
    encoder = SampleEncoder(tokenizer, sample_format, seq_length=seq_length, options=options, limit=limit)
    notes = NoteCounter()
    samples: list[TokenisedSample] = []
    truncated: list[int] = []
    dropped: list[int] = []
    encoded = encode_all(chain([first], rows), encoder, where=str(source), num_processes=num_processes)
    with contextlib.closing(encoded):
        for number, sample, noted in encoded:
            notes.add(number, noted)
            if sample is None:
                dropped.append(number)
                continue
            if sample.truncated:
                truncated.append(number)
            samples.append(sample)
            if len(samples) == max_samples:
                break
    if not samples:
        raise ValueError(_nothing_learned(str(source), len(dropped), notes, f"{limit}={seq_length}", limit))
    return _joined(samples, str(source), truncated=truncated, dropped=dropped, notes=notes.counts())


def _nothing_learned(where: str, num_rows: int, notes: NoteCounter, limit: str, option: str) -> str:
    """Why no sample is left, for the error: the limit, or what the rows lack."""
    beyond = f"dropped: {NO_LEARNED_TOKEN.format(limit=limit)}"
    if all(note.what == beyond for note in notes.counts() if note.what.startswith("dropped: ")):
        found = f"has {NO_LEARNED_TOKEN.format(limit=limit).replace('no answer', 'an answer')}"
        return f"{where}: none of its {num_rows} samples {found}: raise {option} or add answers"
    return f"{where}: none of its {num_rows} samples has anything to learn ({shown(notes.counts())}): add answers"


def _joined(
    samples: list[TokenisedSample],
    path: str,
    *,
    truncated: list[int],
    dropped: list[int],
    notes: tuple[NoteCount, ...],
) -> SFTDataset:
    """The samples in flat arrays, with the report; `truncated` and `dropped` are numbers of rows."""
    sizes = np.array([len(sample.ids) for sample in samples], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    learned = np.concatenate([sample.learned for sample in samples])
    report = DataReport(
        path=path,
        samples=len(samples),
        tokens=int(sizes.sum()) - len(samples),
        learned_tokens=int(learned.sum() - learned[starts[:-1]].sum()),
        truncated=len(truncated),
        dropped=len(dropped),
        longest=max(len(sample.ids) for sample in samples) - 1,
        first_truncated=truncated[0] if truncated else None,
        first_dropped=dropped[0] if dropped else None,
        notes=notes,
    )
    arrays = {
        "ids": np.concatenate([sample.ids for sample in samples]),
        "learned": learned,
        "starts": starts,
    }
    return SFTDataset(arrays, report)
