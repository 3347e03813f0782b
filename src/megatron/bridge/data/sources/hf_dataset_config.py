# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which dataset of the Hugging Face hub, or local copy of one, and what becomes of its rows."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron.bridge.data.presets import DATASETS, preset_named
from megatron.bridge.utils.aliases import TakesAliases
from megatron.bridge.utils.section import Section


@dataclass
class HFDatasetSourceConfig(Section, metaclass=TakesAliases):
    """A dataset: which one, which of its splits, and how its rows become samples."""

    _aliases: ClassVar[dict[str, str]] = {
        "path": "dataset_name",
        "path_or_dataset": "dataset_name",
        "name": "subset",
        "config_name": "subset",
        "dataset_subset": "subset",
        "adapter": "process_example_fn",
        "hf_filter_lambda": "filter_fn",
        "load_kwargs": "hf_kwargs",
    }

    dataset_name: str | None = None
    """A name on the hub (`rajpurkar/squad`), a short name (`squad`), or the path of a local copy: a directory that
    `save_to_disk` wrote, one laid out as on the hub, or a file (JSONL, JSON, CSV, Parquet)."""

    subset: str | None = None
    """Which of the dataset's configurations. None: its default."""

    split: str | None = None
    """The training split, perhaps a part of it: `train[:1000]`, `train[5%:]`. None: `train`."""

    validation_split: str | None = None
    """The same for validation. None: `validation`, `valid`, `val`, `dev` or `eval`, where there is one."""

    test_split: str | None = None
    """The same for the test. None: `test`, where there is one."""

    val_proportion: float | None = None
    """Share of the training samples that is held out for validation, where there is no such split. None: that of a
    dataset with a short name; of another, nothing."""

    process_example_fn: str | Callable[..., Any] | None = None
    """What makes a row with `input` and `output` (or `messages`) of a dataset's row: a function of the row, perhaps
    with a second argument `tokenizer`; or a short name, for that dataset's. None: a known dataset's own, else none."""

    filter_fn: Callable[..., Any] | None = None
    """Keeps the rows for which it is true. None: all."""

    revision: str | None = None
    """Branch, tag or commit on the hub. None: the newest."""

    cache_dir: str | None = None
    """Where fetched data is kept. None: as `HF_HUB_CACHE` and `HF_DATASETS_CACHE` say."""

    hf_kwargs: dict[str, Any] | None = None
    """Further arguments for `datasets.load_dataset`, such as `data_files`."""

    trust_remote_code: bool | None = None
    """Accepted; a dataset's own code is never run."""

    dataset_dict: Any = None
    """In place of a name: a `Dataset`, or a dictionary of them by split, or of lists of rows."""

    @classmethod
    def from_name(cls, name: str) -> "HFDatasetSourceConfig":
        """The dataset of that name."""
        return cls(name)

    @property
    def title(self) -> str:
        """Which dataset, for messages."""
        name = self.dataset_name or "dataset_dict"
        return f"{name}/{self.subset}" if self.subset else name

    def check(self, where: str = "dataset.hf_dataset") -> None:
        """Raises ValueError if a field's value cannot work; `where` names the option that holds the source."""
        if (self.dataset_name is None) == (self.dataset_dict is None):
            raise ValueError(f"{where}: expected one of dataset_name and dataset_dict")
        if self.val_proportion is not None and not 0 <= self.val_proportion < 1:
            raise ValueError(f"{where}.val_proportion={self.val_proportion!r}: expected a share from 0 to below 1")
        known = self.process_example_fn
        if isinstance(known, str) and preset_named(known) is None:
            raise ValueError(f"{where}.process_example_fn={known!r}: expected a function, or {', '.join(DATASETS)}")
        for name in ("split", "validation_split", "test_split"):
            if getattr(self, name) is not None:
                read_split(getattr(self, name), f"{where}.{name}")
        for name in self.hf_kwargs or {}:
            if name in ("path", "name", "split", "revision", "cache_dir", "streaming", "trust_remote_code"):
                raise ValueError(f"{where}.hf_kwargs has {name!r}: expected it as a field of its own, or not at all")

    def with_preset(self) -> "HFDatasetSourceConfig":
        """The source with a known dataset's values where none are set; itself for another dataset.

        A directory of that name is a local copy.
        """
        preset = preset_named(self.dataset_name) if self.dataset_name is not None else None
        if preset is None or self.dataset_name is None:
            return self
        return replace(
            self,
            dataset_name=self.dataset_name if Path(self.dataset_name).exists() else preset.repository,
            subset=self.subset or preset.subset,
            split=self.split or preset.train,
            validation_split=self.validation_split or preset.validation,
            test_split=self.test_split or preset.test,
            val_proportion=preset.val_proportion if self.val_proportion is None else self.val_proportion,
            process_example_fn=self.process_example_fn or preset.process,
            hf_kwargs=preset.hf_kwargs | (self.hf_kwargs or {}),
        )

    def process(self) -> Callable[..., Any] | None:
        """The function that a row goes through, if any."""
        if not isinstance(self.process_example_fn, str):
            return self.process_example_fn
        preset = preset_named(self.process_example_fn)
        return None if preset is None else preset.process


_SPLIT = re.compile(r"^(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<end>-?\d+%?)?\])?$")


def read_split(text: str, where: str) -> tuple[str, str | None, str | None]:
    """A split's name, and where the wanted part of it starts and ends.

    Raises:
        ValueError: The text says no split.
    """
    match = _SPLIT.match(text.replace(" ", ""))
    if match is None:
        raise ValueError(
            f"{where}={text!r}: expected a split's name, perhaps with a part of it, such as 'train[:1000]'"
        )
    return match["name"], match["start"], match["end"]


def part_of(size: int, start: str | None, end: str | None) -> range:
    """The rows, from 0, of a part of a split of `size` rows; numbers and percentages as `datasets` reads them."""

    def place(text: str) -> int:
        place = round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        return min(max(place + size if place < 0 else place, 0), size)

    return range(place(start) if start else 0, place(end) if end else size)


def takes_tokenizer(function: Callable[..., Any]) -> bool:
    """Whether a function of a row has a second argument for the tokenizer; one with a value of its own is none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    has_second = len(positional) > 1 and (positional[1].default is None or positional[1].default is positional[1].empty)
    return has_second or any(one.name == "tokenizer" or one.kind == one.VAR_POSITIONAL for one in parameters)
