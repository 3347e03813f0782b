# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The manifest of a checkpoint: the size and checksum of each file, by which damaged files are found.

    iter_0000010/manifest.json    {"algorithm": "crc32", "files": {"__0_0.distcp": [4096, "9ae0daaf"], ...}}

It is written before the tracker moves. CRC-32 detects flipped bits and truncation, but is no protection against someone
who changes files on purpose. Checkpoints of other programs have no manifest and are read without one.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron.bridge.utils.files import atomic_write, is_below

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
ALGORITHM = "crc32"
TENSOR_FILES = ".distcp"

Checksums = dict[str, tuple[int, str]]
"""Size in bytes and checksum of each file, by its path relative to the iteration's directory."""

_READ_AT_ONCE = 1 << 18
"""Bytes to read at once: few enough to stay in a core's cache until they are summed."""


class ChecksumWriter:
    """A binary file for sequential writing that computes the checksum of its content."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._checksum = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes. Written bytes can't be overwritten."""
        self._checksum = zlib.crc32(data, self._checksum)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Flush Python's buffer to the operating system."""
        self._file.flush()

    @property
    def entry(self) -> tuple[int, str]:
        """Size and checksum."""
        return self.tell(), _as_text(self._checksum)


def write_manifest(directory: str | os.PathLike, known: Checksums | None = None) -> None:
    """Write the manifest of a directory that is otherwise complete.

    Args:
        directory: An iteration's directory, before it gets its final name.
        known: Files whose checksums were computed while writing; all others are read. Entries of an existing manifest
            are kept, too.
    """
    directory = Path(directory)
    listed = {**(read_manifest(directory) or {}), **(known or {})}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST_FILE and name not in listed:
            listed[name] = _entry_of(path)
    with atomic_write(directory / MANIFEST_FILE) as file:
        json.dump({"algorithm": ALGORITHM, "files": listed}, file, indent=1)


def read_manifest(directory: str | os.PathLike) -> Checksums | None:
    """The files that a checkpoint should have. None where it has no manifest.

    Raises:
        ValueError: The manifest is damaged.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        if content["algorithm"] != ALGORITHM:
            raise ValueError(f"its algorithm is {str(content['algorithm'])[:20]!r}")
        listed = {str(name): (int(size), str(checksum)) for name, (size, checksum) in content["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"{path} is damaged ({reason}): expected {ALGORITHM} checksums; {_WAY_OUT}") from error
    wrong = next((name for name in listed if not is_below(name)), None)
    if wrong is not None:
        raise ValueError(f"{path} names {wrong[:80]!r}: expected files below {path.parent}; {_WAY_OUT}")
    return listed


_WAY_OUT = "load another iteration (checkpoint.ckpt_step); if the files were changed on purpose, remove manifest.json"


def check_files_of(
    directory: str | os.PathLike, is_wanted: Callable[[str], bool], *, share: int = 0, shares: int = 1
) -> int:
    """Compare files with the manifest.

    Args:
        directory: An iteration's.
        is_wanted: Which files to check, by relative path.
        share: Check only each `shares`-th file, from this one on, to divide the work among ranks.
        shares: Number of ranks that divide the work.

    Returns:
        Bytes that were read; 0 if there is no manifest.

    Raises:
        ValueError: A file is missing, truncated, or changed. Names the file.
    """
    listed = read_manifest(directory)
    if listed is None:
        logger.debug("%s has no %s: its files are not checked", directory, MANIFEST_FILE)
        return 0
    names = sorted(name for name in listed if is_wanted(name))[share::shares]
    num_bytes = sum(listed[name][0] for name in names)
    is_hidden = None if share == 0 else True  # None: where there is no terminal
    with tqdm(total=num_bytes, desc="checking files", unit="B", unit_scale=True, leave=False, disable=is_hidden) as bar:
        for name in names:
            found = damage_of(Path(directory) / name, listed[name], progress=bar.update)
            if found is not None:
                raise ValueError(f"{Path(directory) / name} {found}; {_WAY_OUT}")
    return num_bytes


def damage_of(path: Path, entry: tuple[int, str], *, progress: Callable[[int], Any] = lambda _: None) -> str | None:
    """What is wrong with a file, as text; None if it matches the manifest.

    Args:
        path: The file.
        entry: The size and the checksum that it should have.
        progress: Called with the number of bytes after each read.
    """
    size, checksum = entry
    if not path.is_file():
        return f"is missing: expected {size} bytes"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes: expected {size}"
    found = _entry_of(path, progress)[1]
    return None if found == checksum else f"is damaged: its {ALGORITHM} is {found}, expected {checksum}"


def is_tensor_file(name: str) -> bool:
    """Whether a file holds tensors. These files are all but a few megabytes of a checkpoint."""
    return name.endswith(TENSOR_FILES)


def is_small_file(name: str) -> bool:
    """Whether a file holds anything else."""
    return not is_tensor_file(name)


def _entry_of(path: Path, progress: Callable[[int], Any] = lambda _: None) -> tuple[int, str]:
    size = checksum = 0
    block = memoryview(bytearray(_READ_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            size += count
            checksum = zlib.crc32(block[:count], checksum)
            progress(count)
    return size, _as_text(checksum)


def _as_text(checksum: int) -> str:
    return f"{checksum:08x}"
