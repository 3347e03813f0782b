# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Pack samples into rows beforehand, into files that `packed_train_data_path` reads.

A run packs its data by itself within seconds. Files are for other programs that read them, and for runs that are to
have the same rows whatever their seed.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from megatron.bridge.data.packing import PackedDataset
from megatron.bridge.data.sft import SFTDataset, tokenise
from megatron.bridge.data.sft_options import SFTOptions, check_positive
from megatron.bridge.data.sources import JsonlSource, Source
from megatron.bridge.data.tokenizer import Tokenizer
from megatron.bridge.utils.files import atomic_write

__all__ = ["prepare_gpt_sft_packed_data", "write_packed_rows"]

logger = logging.getLogger(__name__)


def prepare_gpt_sft_packed_data(
    input_path: str | Path | Source,
    output_path: str | Path,
    output_metadata_path: str | Path | None = None,
    packed_sequence_size: int = 2048,
    tokenizer: Tokenizer | None = None,
    max_seq_length: int | None = None,
    seed: int = 0,
    dataset_kwargs: dict[str, Any] | None = None,
    pad_seq_to_mult: int = 1,
) -> None:
    """Tokenises rows, packs them, and writes the packs. Call it on one rank; the others don't take part.

    Args:
        input_path: A JSONL file, or another source.
        output_path: A file to write: `.npy`, or `.parquet`, which needs the extra `datasets`.
        output_metadata_path: A JSON file to write with figures of the packs. None: none.
        packed_sequence_size: Positions of a row.
        tokenizer: As made by `build_tokenizer`.
        max_seq_length: Longest sample in tokens. None: `packed_sequence_size`.
        seed: Decides among samples of one length.
        dataset_kwargs: Format of the rows, as in `GPTSFTDatasetConfig`.
        pad_seq_to_mult: Each sample is padded to a multiple of this many positions.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no tokenizer, a row can't be read, or the output has another suffix.
    """
    if tokenizer is None:
        raise ValueError("prepare_gpt_sft_packed_data has no tokenizer: expected one, as made by build_tokenizer")
    for name, value in (("packed_sequence_size", packed_sequence_size), ("pad_seq_to_mult", pad_seq_to_mult)):
        check_positive(name, value)
    longest = packed_sequence_size // pad_seq_to_mult * pad_seq_to_mult
    samples = tokenise(
        JsonlSource(input_path) if isinstance(input_path, str | Path) else input_path,
        tokenizer,
        seq_length=min(longest, max_seq_length or longest),
        options=SFTOptions.from_kwargs(dataset_kwargs),
        limit="packed_sequence_size",
    )
    logger.info("%s", samples.report)
    for line in samples.report.warnings:
        logger.warning("%s", line)
    write_packed_rows(
        samples,
        Path(output_path),
        metadata_path=None if output_metadata_path is None else Path(output_metadata_path),
        size=packed_sequence_size,
        seed=seed,
        multiple_of=pad_seq_to_mult,
        pad_id=tokenizer.pad_id,
    )


def write_packed_rows(
    samples: SFTDataset,
    path: Path,
    *,
    metadata_path: Path | None,
    size: int,
    seed: int,
    multiple_of: int = 1,
    pad_id: int = 0,
) -> None:
    """Packs tokenised samples and writes the packs.

    Args:
        samples: The samples, each at most `size` long.
        path: `.npy` or `.parquet`.
        metadata_path: A JSON file with figures. None: none.
        size: Positions of a row.
        seed: Decides among samples of one length.
        multiple_of: Each sample is padded to a multiple of this many positions.
        pad_id: The token that it is padded with.

    Raises:
        ValueError: The path has another suffix, or pyarrow isn't installed.
    """
    packed = PackedDataset(samples, size=size, seed=seed, multiple_of=multiple_of, pad_id=pad_id)
    rows = [_row(packed, pack) for pack in range(len(packed))]
    if path.suffix == ".npy":
        objects = np.empty(len(rows), dtype=object)
        objects[:] = rows
        with atomic_write(path, "wb") as stream:
            np.save(stream, objects, allow_pickle=True)
    elif path.suffix in (".parquet", ".pq"):
        _write_parquet(path, rows)
    else:
        raise ValueError(f"output_path={str(path)!r}: expected a file that ends in .npy or .parquet")
    logger.info("%s: %s", path, packed.report)
    if metadata_path is not None:
        figures = {
            "max_samples_per_bin": max(map(len, packed.packs)),
            "dataset_max_seqlen": int(np.asarray(samples.lengths).max()),
            "packed_max_seqlen": int(packed.lengths.max()),
            "num_packs": len(packed),
            "num_samples": len(samples),
        }
        with atomic_write(metadata_path, "w") as stream:
            stream.write(json.dumps([figures], indent=2))


def _row(packed: PackedDataset, pack: int) -> dict[str, list[int]]:
    """A pack as its file has it: each sample with its last token, which is only a label."""
    row = packed[pack]
    tokens, labels, learned = (row[name].tolist() for name in ("tokens", "labels", "loss_mask"))
    ends = row["cu_seqlens"].tolist()
    made: dict[str, list[int]] = {"input_ids": [], "loss_mask": [], "seq_start_id": []}
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        made["seq_start_id"].append(len(made["input_ids"]))
        made["input_ids"] += [tokens[start], *labels[start:end]]
        made["loss_mask"] += [*map(int, learned[start:end]), 0]
    return made


def _write_parquet(path: Path, rows: list[dict[str, list[int]]]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path} needs the pyarrow library, which can't be imported ({error}): pip install "
            "'megatron-bridge[datasets]', or write a .npy file"
        ) from error
    with atomic_write(path, "wb") as stream:
        parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
