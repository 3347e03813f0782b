# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Reads JSON Lines files; an error names the file and the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROGRESS_FROM_BYTES = 1 << 20


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
                    bar.update(len(raw))
                    text = _decode(raw, path, number)
                    if text.strip():
                        yield number, _parse(text.rstrip(), path, number)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: expected a JSONL file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): expected a readable JSONL file") from error


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}): re-encode it") from error


def _parse(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        found = f"not valid JSON ({error.msg} at column {error.colno})"
        raise ValueError(f"{path}:{number}: {found}: expected one JSON object; fix or remove the line") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not valid JSON ({error}): expected one JSON object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number}: a JSON {type(row).__name__}: expected an object such as {{...}}")
    return row
