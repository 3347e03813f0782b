# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the function that builds the datasets of a configuration."""

from collections.abc import Callable
from typing import Any

from megatron.bridge.data.loaders import build_datasets

__all__ = ["get_dataset_provider"]


def get_dataset_provider(dataset_config: Any) -> Callable[..., Any]:
    """What `setup` takes as `train_valid_test_datasets_provider` for a dataset configuration.

    Args:
        dataset_config: `GPTSFTDatasetConfig`, `GPTDatasetConfig`, or a `DatasetProvider`; other kinds are refused when
            the data is built.

    Returns:
        A function of the configuration and a `DatasetBuildContext` that gives training, validation and test datasets.
    """
    return build_datasets
