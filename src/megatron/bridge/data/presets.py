# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Datasets of the hub that recipes know by a short name: where they are, their splits, and how their rows are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.data import hf_processors as rows


@dataclass(frozen=True, kw_only=True)
class DatasetPreset:
    """One dataset."""

    repository: str
    """Its name on the hub."""

    process: Callable[..., dict[str, Any]]
    """What a row becomes."""

    subset: str | None = None
    """Which of its configurations."""

    train: str = "train"
    """The training split, and below the others. None: it has none."""

    validation: str | None = None
    test: str | None = None

    val_proportion: float | None = 0.05
    """The share of the training split that is held out, where there is no validation split."""

    hf_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments for `load_dataset`."""


DATASETS: dict[str, DatasetPreset] = {
    "squad": DatasetPreset(
        repository="rajpurkar/squad", subset="plain_text", validation="validation", process=rows.process_squad_example
    ),
    "gsm8k": DatasetPreset(repository="openai/gsm8k", subset="main", test="test", process=rows.process_gsm8k_example),
    "openmathinstruct2": DatasetPreset(
        repository="nvidia/OpenMathInstruct-2",
        # Its other splits are the same problems again, and 14 million rows.
        hf_kwargs={"data_files": {"train": "data/train_1M-*.parquet"}},
        process=rows.process_openmathinstruct2_example,
    ),
    "alpaca": DatasetPreset(repository="tatsu-lab/alpaca", process=rows.process_alpaca_example),
    "dolly": DatasetPreset(repository="databricks/databricks-dolly-15k", process=rows.process_dolly_example),
    "no_robots": DatasetPreset(
        repository="HuggingFaceH4/no_robots", test="test", process=rows.process_messages_example
    ),
    "ultrachat": DatasetPreset(
        repository="HuggingFaceH4/ultrachat_200k",
        train="train_sft",
        validation="test_sft",
        process=rows.process_messages_example,
    ),
    "tulu3": DatasetPreset(repository="allenai/tulu-3-sft-mixture", process=rows.process_messages_example),
    "smoltalk": DatasetPreset(
        repository="HuggingFaceTB/smoltalk", subset="all", test="test", process=rows.process_messages_example
    ),
    "openhermes": DatasetPreset(repository="teknium/OpenHermes-2.5", process=rows.process_messages_example),
}
"""By the short name. The repository's name finds them too."""

_OTHER_NAMES = {"openmathinstruct-2": "openmathinstruct2", "ultrachat_200k": "ultrachat"}


def preset_named(name: str) -> DatasetPreset | None:
    """The preset of a short name, or of a repository's; None: there is none."""
    asked = name.strip().casefold()
    by_repository = {preset.repository.casefold(): preset for preset in DATASETS.values()}
    return DATASETS.get(_OTHER_NAMES.get(asked, asked)) or by_repository.get(asked)
