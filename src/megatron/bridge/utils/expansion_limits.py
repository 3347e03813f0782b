# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Refuse small files that become huge when read: compressed archives, and YAML or pickles with repeated references."""

import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_EXPANSION = 1_000_000
"""Values and characters that any file may expand to. A longer file may expand to four times its size in bytes."""

DEEPEST = 100
"""Levels of nested values that a file may have."""

Containers = Mapping[type, Callable[[Any], Collection[Any]]]
"""Container types, with a function that returns the values in one. All other types count as leaves."""

PLAIN_CONTAINERS: Containers = {
    **dict.fromkeys((list, tuple, set, frozenset), lambda value: value),
    **dict.fromkeys((dict, OrderedDict), lambda value: [*value.keys(), *value.values()]),
}


def check_expansion(value: Any, num_bytes: int, containers: Containers = PLAIN_CONTAINERS) -> None:
    """Refuse a value that is much larger than its file because parts are shared, or that is nested too deep.

    Walking through such a value, or printing it, would take forever. This function visits each part once.

    Args:
        value: The value that was read.
        num_bytes: Size of the file.
        containers: See `Containers`.

    Raises:
        ValueError: Names the size or the depth.
    """
    size, depth = _expanded(value, containers)
    if depth > DEEPEST:
        found = "it holds itself" if math.isinf(depth) else f"it is nested {depth} deep"
        raise ValueError(f"{found}: expected at most {DEEPEST} levels")
    if size > max(LARGEST_EXPANSION, 4 * num_bytes):
        raise ValueError(f"its {num_bytes} bytes stand for {size:.3g} values: its parts are named again and again")


def _expanded(root: Any, containers: Containers) -> tuple[float, float]:
    """(size, depth) of a value, with shared parts counted at each occurrence. Not recursive."""
    known: dict[int, tuple[float, float]] = {}
    entered: set[int] = set()
    waiting = [root]

    while waiting:
        value = waiting[-1]
        parts = containers[type(value)](value) if type(value) in containers else ()
        if id(value) in known:
            waiting.pop()
        elif containers.keys().isdisjoint(map(type, parts)):
            known[id(value)] = 1 + sum(map(_weight, parts)), 1
            waiting.pop()
        elif id(value) not in entered:
            entered.add(id(value))
            new = [part for part in parts if type(part) in containers and id(part) not in known]
            if any(id(part) in entered for part in new):  # entered and not left: it holds `value`
                return math.inf, math.inf
            waiting += new
        else:
            nested = [known[id(part)] for part in parts if type(part) in containers]
            leaves = sum(_weight(part) for part in parts if type(part) not in containers)
            known[id(value)] = 1 + leaves + sum(size for size, _ in nested), 1 + max(depth for _, depth in nested)
            waiting.pop()
    return known[id(root)]


def _weight(leaf: Any) -> int:
    return len(leaf) if type(leaf) in (str, bytes) else 1


def check_archive(source: str | Path | BinaryIO, *, sums: bool = True) -> None:
    """Refuse a zip archive, as torch and NumPy write them, that is compressed or damaged.

    Args:
        source: A path, or an open file, which is rewound.
        sums: Read the whole archive and compare its checksums, if it has any. Torch doesn't do that.

    Raises:
        zipfile.BadZipFile: The file is compressed, damaged, or not an archive.
        OSError: The file can't be read.
    """
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        deflated = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if deflated is not None:
            raise zipfile.BadZipFile(f"{deflated[:80]!r} in it is compressed, which torch and NumPy don't do")
        assert archive.fp is not None  # it is until the archive is closed
        archive.fp.seek(0, 2)
        if sum(entry.file_size for entry in entries) > archive.fp.tell():
            raise zipfile.BadZipFile("its entries overlap: they are larger than the file")
        has_sums = any(entry.CRC for entry in entries)  # torch.serialization.set_crc32_options(False) leaves zeros
        changed = archive.testzip() if sums and has_sums else None
        if changed is not None:
            raise zipfile.BadZipFile(f"the checksum of {changed[:80]!r} in it is wrong")
    if not isinstance(source, (str, Path)):
        source.seek(0)
