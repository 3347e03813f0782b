# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Small files that become huge as they are read: archives that inflate, YAML and pickles that name parts many times."""

import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_EXPANSION = 1_000_000
"""Values and characters that any file may stand for; a longer file may stand for four times its own bytes."""

DEEPEST = 100
"""Levels of nested values that a file may have."""

Containers = Mapping[type, Callable[[Any], Collection[Any]]]
"""Types that hold values, and what gives the values; the others hold none."""

PLAIN_CONTAINERS: Containers = {
    **dict.fromkeys((list, tuple, set, frozenset), lambda value: value),
    **dict.fromkeys((dict, OrderedDict), lambda value: [*value.keys(), *value.values()]),
}


def check_expansion(value: Any, num_bytes: int, containers: Containers = PLAIN_CONTAINERS) -> None:
    """Refuse a value that is larger than its file because its parts share parts, or that is nested too deep.

    Whatever walks through such a value, or prints it, would never end. This looks at each part once.

    Args:
        value: What was read.
        num_bytes: Of the file.
        containers: See `Containers`.

    Raises:
        ValueError: Says how large or how deep it is.
    """
    size, depth = _expanded(value, containers)
    if depth > DEEPEST:
        found = "it holds itself" if math.isinf(depth) else f"it is nested {depth} deep"
        raise ValueError(f"{found}: expected at most {DEEPEST} levels")
    if size > max(LARGEST_EXPANSION, 4 * num_bytes):
        raise ValueError(f"its {num_bytes} bytes stand for {size:.3g} values: its parts are named again and again")


def _expanded(root: Any, containers: Containers) -> tuple[float, float]:
    """(size, depth) of a value with its shared parts counted wherever they stand; without recursion."""
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
    """Refuse an archive (what torch and NumPy write) that inflates, is damaged, or is none.

    Args:
        source: A path, or an open file, which is left at its beginning.
        sums: Read all of it and compare its checksums, where it has any, which torch doesn't.

    Raises:
        zipfile.BadZipFile: Says what is wrong.
        OSError: It can't be read.
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
