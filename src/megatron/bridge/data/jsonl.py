# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Reads JSON Lines files; an error names the file and the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROGRESS_FROM_BYTES = 1 << 20

OTHER_FORMATS = {
    b"\x1f\x8b": "gzip-compressed: unpack it (gunzip)",
    b"BZh": "bzip2-compressed: unpack it (bunzip2)",
    b"\xfd7zXZ\x00": "xz-compressed: unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it (unzstd)",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a Parquet file: write JSON lines, or save it with datasets' save_to_disk and set dataset.hf_dataset",
    b"ARROW1": "an Arrow file: write JSON lines, or save it with datasets' save_to_disk and set dataset.hf_dataset",
    b"\xff\xfe": "UTF-16 text: re-encode it as UTF-8",
    b"\xfe\xff": "UTF-16 text: re-encode it as UTF-8",
}
"""What files begin with that are no JSON lines, and what to do."""


def read_rows(path: str | Path, *, show_progress: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each line of `path` that is not blank.

    Args:
        path: A UTF-8 file with one JSON object a line.
        show_progress: Whether to draw a progress bar (on a terminal, for a file of a megabyte or more).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or a line is not a JSON object.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            size = path.stat().st_size
            hidden = None if show_progress and size >= PROGRESS_FROM_BYTES else True
            with tqdm(total=size, desc=f"tokenising {path.name}", unit="B", unit_scale=True, disable=hidden) as bar:
                for number, raw in enumerate(stream, start=1):
                    if number == 1:
                        _check_beginning(raw, path)
                    bar.update(len(raw))
                    text = _decode(raw, path, number)
                    if text.strip():
                        yield number, _parse(text.rstrip(), path, number)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: expected a JSONL file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): expected a readable JSONL file") from error


def read_json(text: str) -> Any:
    """What a JSON text says; a key that an object has twice is refused, as one of its values would be lost."""
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in made if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _check_beginning(raw: bytes, path: Path) -> None:
    for beginning, what in OTHER_FORMATS.items():
        if raw.startswith(beginning):
            raise ValueError(f"{path} is {what}; expected UTF-8 text with one JSON object a line")


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}): re-encode it") from error


def _parse(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = read_json(text)
    except json.JSONDecodeError as error:
        found = f"not valid JSON ({error.msg} at column {error.colno})"
        raise ValueError(f"{path}:{number}: {found}: expected one JSON object; fix or remove the line") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not valid JSON ({error}): expected one JSON object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number}: a JSON {type(row).__name__}: expected an object such as {{...}}")
    return row
