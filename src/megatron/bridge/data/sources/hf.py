# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Datasets of the Hugging Face hub, for scripts that read them by themselves."""

from typing import Any

from megatron.bridge.data.sources.hf_dataset_config import HFDatasetSourceConfig
from megatron.bridge.data.sources.hf_splits import AdaptedSource, find_split, open_hf_source

__all__ = ["HFDatasetSourceConfig", "hf_dataset_supports_split", "load_and_adapt_hf_dataset"]


def hf_dataset_supports_split(source: HFDatasetSourceConfig | str, split: str) -> bool:
    """Whether a dataset has a split.

    Args:
        source: The dataset, or its name.
        split: Its own name for the split, or one of training, validation and test.

    Raises:
        FileNotFoundError, ValueError: The dataset can't be opened.
    """
    source = as_source(source)
    return find_split(open_hf_source(source), source, split) is not None


def load_and_adapt_hf_dataset(
    source: HFDatasetSourceConfig | str, split: str | None = None, tokenizer: Any = None
) -> list[dict[str, Any]]:
    """The rows of a split, as they are tokenised: filtered, and made by `process_example_fn`.

    Args:
        source: The dataset, or its name.
        split: Its own name for the split, perhaps with a part of it, or one of training, validation and test. None: the
            training split.
        tokenizer: For a `process_example_fn` that takes one.

    Raises:
        FileNotFoundError: There is no such dataset here and it can't be fetched, or it lacks the split.
        ValueError: It can't be read.
    """
    source = as_source(source)
    opened = open_hf_source(source)
    found = find_split(opened, source, split or "training")
    if found is None:
        raise FileNotFoundError(f"{source.title} has no split {split or 'training'!r} (found: {', '.join(opened)})")
    return [row for _, row in AdaptedSource(source, found, opened=opened, tokenizer=tokenizer).rows()]


def as_source(source: HFDatasetSourceConfig | str) -> HFDatasetSourceConfig:
    """A source by itself or by its name, checked, with a known dataset's values where none are set."""
    source = HFDatasetSourceConfig(source) if isinstance(source, str) else source
    source.check("source")
    return source.with_preset()
