# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows that were packed beforehand: `.npy` files as NeMo and Megatron Bridge write them, and parquet of those columns.

A row has `input_ids` (all samples, one after the other, each with its last token), `seq_start_id` (where each sample
starts in them) and `loss_mask` (1 at a position whose next token is learned). A sample of L tokens has L - 1 positions.
"""

import glob
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron.bridge.data.object_arrays import read_object_array
from megatron.bridge.data.packing import PackReport
from megatron.bridge.data.same_data import check_same_on_all_ranks
from megatron.bridge.utils.distributed import raise_on_all_ranks

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "loss_mask", "seq_start_id")
SUFFIXES = (".npy", ".parquet", ".pq")
MAKE_AGAIN = "pack the data again with this run's tokenizer and size"


@dataclass(frozen=True)
class PackedForm:
    """What rows must fit.

    Attributes:
        size: Most positions of a row.
        size_option: The option that `size` comes from, for messages.
        vocab_size: The tokenizer's number of tokens: ids are below it.
        multiple_of: Each sample's positions are a multiple of this.
    """

    size: int
    size_option: str
    vocab_size: int
    multiple_of: int = 1


class PrepackedDataset(Dataset):
    """Rows of several samples, read from files.

    Attributes:
        is_packed: True: items have `cu_seqlens`.
        lengths: Positions of each row, int64 [number of rows].
        report: Figures of the rows.
    """

    is_packed = True

    def __init__(self, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], *, size: int) -> None:
        """Takes rows as `_checked` returns them; `size` is the most positions of a row, for the report."""
        ids, masks, starts = zip(*rows, strict=True)
        self._ids, self._learned, self._starts = map(np.concatenate, (ids, masks, starts))
        self._row_ids = np.cumsum([0, *map(len, ids)])
        self._row_starts = np.cumsum([0, *map(len, starts)])
        num_samples = np.diff(self._row_starts)
        self.lengths = np.diff(self._row_ids) - num_samples
        self.most_samples = int(num_samples.max())
        self.report = PackReport(len(rows), int(num_samples.sum()), int(self.lengths.sum()), size)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns tokens, labels, position_ids (int64) and loss_mask (float32), each [S], and cu_seqlens, on the host.

        The last token of a sample is only a label: it isn't followed by the first of the next one.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        inside = slice(self._row_ids[index], self._row_ids[index + 1])
        ids, learned = self._ids[inside].astype(np.int64), self._learned[inside].astype(np.float32)
        starts = self._starts[self._row_starts[index] : self._row_starts[index + 1]]
        lengths = np.diff(np.append(starts, len(ids))) - 1
        is_position = np.ones(len(ids), dtype=bool)
        is_position[np.append(starts[1:], len(ids)) - 1] = False
        return {
            "tokens": torch.from_numpy(ids[is_position]),
            "labels": torch.from_numpy(np.append(ids[1:], 0)[is_position]),
            "loss_mask": torch.from_numpy(learned[is_position]),
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
            "cu_seqlens": torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        }


def load_prepacked(pattern: str, option: str, *, form: PackedForm, metadata_path: str | None) -> PrepackedDataset:
    """Reads and checks all rows, in order of the files' names. Call on all ranks; an error ends all of them.

    Args:
        pattern: A file, a directory of files, or a pattern such as `packs/train_*.npy`.
        option: The option that names it, for messages.
        form: What the rows must fit.
        metadata_path: A JSON file that says what the rows hold. None: there is none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file can't be read, or a row doesn't fit; names the row.
        RuntimeError: Another rank failed; its error's text.
    """
    with raise_on_all_ranks(f"reading {pattern}"):
        paths = find_packed_files(pattern, option)
        rows = [row for path in paths for row in _rows_of(path, form)]
        if not rows:
            raise ValueError(f"{option}={pattern!r} holds no rows: {MAKE_AGAIN}")
        dataset = PrepackedDataset(rows, size=form.size)
        if not dataset._learned.any():
            raise ValueError(f"{option}={pattern!r}: no token of its {len(rows)} rows is learned: {MAKE_AGAIN}")
        if metadata_path is not None:
            check_metadata(Path(metadata_path), dataset)
    check_same_on_all_ranks((dataset._ids, dataset._learned, dataset._starts), f"{option}={pattern!r}")
    return dataset


def find_packed_files(pattern: str, option: str) -> list[Path]:
    """Returns the files that a path, a directory or a pattern names, sorted.

    Raises:
        FileNotFoundError: There are none.
        ValueError: One is neither `.npy` nor parquet.
    """
    path = Path(pattern)
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES)
    else:
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not found:
        raise FileNotFoundError(f"{option}={pattern!r}: there is no such file; expected packs in .npy or parquet files")
    for each in found:
        if each.suffix not in SUFFIXES or not each.is_file():
            raise ValueError(f"{option}={pattern!r} names {each}: expected files that end in {', '.join(SUFFIXES)}")
    return found


def check_metadata(path: Path, dataset: PrepackedDataset) -> None:
    """Refuses rows that hold more than their metadata says.

    Args:
        path: The JSON file: an object, or a list with one for each set of rows.
        dataset: The rows.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, or doesn't belong to the rows.
    """
    expected = "expected the metadata of the packs: a list of objects with max_samples_per_bin"
    if not path.is_file():
        raise FileNotFoundError(f"packed_metadata_path={str(path)!r}: there is no such file; {expected}, or unset it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}): {expected}") from error
    entries = [content] if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} holds a {type(content).__name__}: {expected}")
    bounds = {
        "max_samples_per_bin": ("samples in a row", dataset.most_samples),
        "pack_size": ("positions in a row", int(dataset.lengths.max())),
    }
    for name, (counted, found) in bounds.items():
        said = [entry[name] for entry in entries if name in entry]
        if not all(isinstance(number, int) for number in said):
            raise ValueError(f"{path}: {name} is {said}: expected whole numbers")
        if said and found > max(said):
            raise ValueError(
                f"{path} says {name}={max(said)}, but there are up to {found} {counted}: it isn't of these packs"
            )


def _rows_of(path: Path, form: PackedForm) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rows = read_object_array(path) if path.suffix == ".npy" else _parquet_rows(path)
    for number, row in enumerate(rows):
        try:
            yield _checked(row, form)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path} needs the pyarrow library, which can't be imported ({error}): pip install "
            "'megatron-bridge[datasets]', or write .npy files"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=256, columns=names):
            columns = [batch.column(name) for name in names]
            for number in range(batch.num_rows):
                values = (column[number].values for column in columns)
                yield dict(zip(names, map(_as_numpy, values), strict=True))
    except (OSError, ValueError, AttributeError, NotImplementedError) as error:  # a column of numbers has no `values`
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} can't be read ({reason}): expected parquet with lists in {', '.join(COLUMNS)}"
        ) from error


def _as_numpy(values: Any) -> np.ndarray | None:
    return None if values is None else values.to_numpy(zero_copy_only=False)


def _checked(row: Any, form: PackedForm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids (int32 [L]), what is learned (bool [L]) and where samples start (int64 [N]) of one row.

    A start at the end of the row, and a sample of one token, which has no position, are left out.

    Raises:
        ValueError: Says what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}: expected an object with {', '.join(COLUMNS)}")
    ids, learned, starts = (_integers(row, name) for name in COLUMNS)
    if len(learned) != len(ids):
        raise ValueError(f"{len(ids)} input_ids, but {len(learned)} in loss_mask: {MAKE_AGAIN}")
    if (wrong := ids[(ids < 0) | (ids >= form.vocab_size)]).size:
        raise ValueError(f"token {wrong[0]} is outside the tokenizer's {form.vocab_size}: {MAKE_AGAIN}")
    if not np.isin(learned, (0, 1)).all():
        raise ValueError(f"loss_mask holds {learned[~np.isin(learned, (0, 1))][0]}: expected 0 and 1")
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] > len(ids):
        raise ValueError(
            f"seq_start_id is {_short(starts)} in a row of {len(ids)} ids: expected 0 and then rising starts"
        )
    sizes = np.diff(np.append(starts, len(ids)))
    positions = sizes - 1
    kept = positions > 0
    if not kept.any():
        raise ValueError("no sample in it has two tokens: expected at least one position")
    if (odd := positions[kept] % form.multiple_of).any():
        raise ValueError(
            f"a sample has {positions[kept][odd.argmax()]} positions: expected multiples of pad_seq_to_mult="
            f"{form.multiple_of}; {MAKE_AGAIN}"
        )
    inside = np.repeat(kept, sizes)
    if inside.sum() - kept.sum() > form.size:
        found = inside.sum() - kept.sum()
        raise ValueError(f"{found} positions: expected at most {form.size_option}={form.size}; {MAKE_AGAIN}")
    starts = np.cumsum([0, *sizes[kept][:-1]])
    return ids[inside].astype(np.int32), learned[inside].astype(bool), starts


def _integers(row: dict[str, Any], name: str) -> np.ndarray:
    """One column of a row, int64 [L]; floats that are whole numbers count as such in `loss_mask`."""
    if row.get(name) is None:
        raise ValueError(f"it has no {name} (found: {', '.join(map(str, row))}): expected {', '.join(COLUMNS)}")
    try:
        values = np.asarray(row[name])
    except (ValueError, TypeError, OverflowError) as error:  # lists in it have different lengths
        raise ValueError(f"{name} is no list of numbers ({error})") from None
    kinds = "biuf" if name == "loss_mask" else "iu"
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in kinds:
        raise ValueError(f"{name} is of type {values.dtype} and shape {list(values.shape)}: expected a list of numbers")
    return values if values.dtype.kind == "f" else values.astype(np.int64)


def _short(values: np.ndarray) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"[{shown}{', …' if len(values) > 8 else ''}]"
