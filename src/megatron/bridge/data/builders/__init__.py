# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the dataset configurations, which scripts of 2026's second half import from here."""

from megatron.bridge.data.config import (
    DatasetBuildContext,
    DatasetProvider,
    FinetuningDatasetConfig,
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    MockGPTDatasetConfig,
)

__all__ = [
    "DatasetBuildContext",
    "DatasetProvider",
    "FinetuningDatasetConfig",
    "GPTDatasetConfig",
    "GPTSFTDatasetConfig",
    "MockGPTDatasetConfig",
]
