# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The splits of a dataset: opened from where it is, cut, filtered, and their rows adapted."""

import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from megatron.bridge.data.sources import Row, Source
from megatron.bridge.data.sources.arrow import ArrowSource
from megatron.bridge.data.sources.hf_dataset_config import HFDatasetSourceConfig, part_of, read_split, takes_tokenizer
from megatron.bridge.data.sources.hf_loading import load_from_hub, load_local
from megatron.bridge.utils.hf_hub import is_hub_name

logger = logging.getLogger(__name__)

USUAL_NAMES = {
    "training": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
"""What datasets call their splits."""

_FIELDS = {"training": "split", "validation": "validation_split", "test": "test_split"}
_PLAIN = (type(None), bool, int, float, str, bytes, tuple, list, dict, set, frozenset)
ALONE = "alone"
"""The name of a dataset without splits."""


def open_hf_source(source: HFDatasetSourceConfig) -> dict[str, Source]:
    """Opens a dataset: what is here under its name, else what the hub has.

    Args:
        source: The dataset, with its preset's values.

    Returns:
        Its splits by their own names; one under `ALONE` where it has none.

    Raises:
        FileNotFoundError: It is neither here nor on the hub.
        ValueError: It can't be read, or the `datasets` library is needed and isn't installed.
    """
    if source.dataset_dict is not None:
        given = source.dataset_dict if isinstance(source.dataset_dict, Mapping) else {ALONE: source.dataset_dict}
        return {
            name: ArrowSource(rows, where=f"{source.title} ({name})", label=str(name)) for name, rows in given.items()
        }
    assert source.dataset_name is not None  # check() refuses it
    local = Path(source.dataset_name).expanduser()
    if local.exists():
        return load_local(source, local, alone=ALONE)
    name = source.dataset_name
    # What can only be a path is not looked up on a hub: "data/mine" is one where the directory "data" exists.
    if not is_hub_name(name) or ("/" in name and local.parent.exists()):
        raise FileNotFoundError(
            f"dataset.hf_dataset={name!r} does not exist: expected a directory that save_to_disk wrote, one laid out "
            "as on the hub, or a file of rows"
        )
    return load_from_hub(source)


def find_split(opened: Mapping[str, Source], source: HFDatasetSourceConfig, split: str) -> str | None:
    """The text that says a split: its name, perhaps with a part of it; None where there is none.

    Args:
        opened: As `open_hf_source` returns.
        source: The dataset, with its preset's values.
        split: One of training, validation and test, or the dataset's own name, perhaps with a part of it.

    Raises:
        FileNotFoundError: The source names a split that isn't there.
    """
    if split not in USUAL_NAMES:
        return split if read_split(split, "split")[0] in opened else None
    said = getattr(source, _FIELDS[split])
    if said is not None:
        if read_split(said, _FIELDS[split])[0] in opened:
            return said
        if split == "training" and ALONE in opened:
            return said
        found = ", ".join(map(repr, opened))
        raise FileNotFoundError(
            f"{source.title} has no split {said!r} (found: {found}): set hf_dataset.{_FIELDS[split]}"
        )
    if split == "training" and len(opened) == 1 and ALONE in opened:
        return ALONE
    return next((name for name in USUAL_NAMES[split] if name in opened), None)


class AdaptedSource:
    """A split as its samples are made of: a part of its rows, those that the filter keeps, adapted."""

    expected = "rows"

    def __init__(
        self,
        source: HFDatasetSourceConfig,
        split: str,
        *,
        opened: Mapping[str, Source] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Keeps what to read.

        Args:
            source: The dataset, with its preset's values.
            split: As `find_split` returns.
            opened: As `open_hf_source` returns. None: opened when rows are read.
            tokenizer: For a `process_example_fn` that takes one.
        """
        self.source = source
        self.label = split.replace("[", "-").replace("]", "").replace(":", "-").replace("%", "p")
        self.split = split
        self._opened = opened
        self.tokenizer = tokenizer

    def __str__(self) -> str:
        if self._opened is None:
            return f"{self.source.title} ({self.split})"
        return str(self._raw)

    @property
    def _raw(self) -> Source:
        if self._opened is None:
            self._opened = open_hf_source(self.source)
        name = read_split(self.split, "split")[0]
        return self._opened[name] if name in self._opened else self._opened[ALONE]

    def rows(self, *, show_progress: bool = False) -> Iterator[Row]:
        """Yields the rows that count, with their numbers in the split; raises ValueError naming what can't be read."""
        _, start, end = read_split(self.split, "split")
        wanted = None if start is None and end is None else part_of(self._size(), start, end)
        process, keeps = self.source.process(), self.source.filter_fn
        left_out = 0
        for place, (number, row) in enumerate(self._raw.rows(show_progress=show_progress)):
            if wanted is not None and place not in wanted:
                continue
            if keeps is not None and not self._call("filter_fn", keeps, row, number):
                left_out += 1
                continue
            yield number, row if process is None else self._adapted(process, row, number)
        if left_out:
            logger.info("%s: filter_fn left out %d rows", self, left_out)

    def _size(self) -> int:
        raw = self._raw
        return len(raw) if isinstance(raw, ArrowSource) else sum(1 for _ in raw.rows())

    def _adapted(self, process: Any, row: dict[str, Any], number: int) -> dict[str, Any]:
        made = self._call("process_example_fn", process, row, number)
        if not isinstance(made, dict):
            found = type(made).__name__
            raise ValueError(
                f"{self}:{number}: process_example_fn returned {found}: expected a dict such as input, output"
            )
        return made

    def _call(self, what: str, function: Any, row: dict[str, Any], number: int) -> Any:
        try:
            if not takes_tokenizer(function):
                return function(row)
            by_name = "tokenizer" in inspect.signature(function).parameters
            return function(row, tokenizer=self.tokenizer) if by_name else function(row, self.tokenizer)
        except Exception as error:  # a function of the user's
            name = getattr(function, "__name__", str(function))
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{self}:{number}: {what} {name} raised {reason} (the row has: {', '.join(row)})"
            ) from error

    def digest(self) -> str:
        """A hash of the content and of the functions that it goes through."""
        digest = hashlib.sha256(self._raw.digest().encode())
        for function in (self.source.filter_fn, self.source.process()):
            digest.update(repr(_code_of(function)).encode())
        digest.update(self.split.encode())
        return digest.hexdigest()


def _code_of(function: Any, seen: tuple[Any, ...] = ()) -> Any:
    """What a function does, as plain data: its code, what it holds, and what it takes by name from its own module.

    Of the module's names, plain values and functions that are defined there count, not classes and other objects.
    """
    if function is None:
        return None
    code = getattr(function, "__code__", None)
    if code is None:  # a partial, or an object that can be called
        inner = getattr(function, "func", None) or getattr(type(function), "__call__", None)  # noqa: B004
        held = getattr(function, "args", ()), getattr(function, "keywords", {}), getattr(function, "__dict__", {})
        return _code_of(inner, seen) if hasattr(inner, "__code__") else None, repr(held)
    seen = (*seen, code)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    bound = getattr(function, "__self__", None)
    values = repr((function.__defaults__, function.__kwdefaults__, getattr(bound, "__dict__", bound)))
    return _plain_code(code), values, [_held(cell, seen) for cell in cells], _taken_by_name(function, seen)


def _held(value: Any, seen: tuple[Any, ...]) -> Any:
    if getattr(value, "__code__", None) in seen:  # a function that calls itself
        return None
    if isinstance(value, set | frozenset):  # which are in another order in each process
        return sorted(map(repr, value))
    return _code_of(value, seen) if callable(value) else repr(value)


def _taken_by_name(function: Any, seen: tuple[Any, ...]) -> list[tuple[str, Any]]:
    found = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    return [
        (name, _held(value, seen))
        for name, value in found.items()
        if isinstance(value, _PLAIN) or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    ]


def _names(code: CodeType) -> list[str]:
    """The names that code, and code within it, looks up in its module (and names of attributes)."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return [*code.co_names, *inner]


def _plain_code(code: CodeType) -> Any:
    consts = [_plain_code(one) if isinstance(one, CodeType) else _held(one, ()) for one in code.co_consts]
    return code.co_code.hex(), consts, code.co_names
