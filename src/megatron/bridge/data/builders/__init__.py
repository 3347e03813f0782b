# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the dataset configurations and of what builds them outside a run."""

from typing import Any

from megatron.bridge.data.config import (
    DatasetBuildContext,
    DatasetProvider,
    FinetuningDatasetConfig,
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    MockGPTDatasetConfig,
)
from megatron.bridge.data.direct_hf_config import DirectHFSFTDatasetConfig
from megatron.bridge.data.preprocessing_config import (
    ChatSFTPreprocessingConfig,
    PromptCompletionSFTPreprocessingConfig,
    SFTPreprocessingConfig,
)
from megatron.bridge.data.sources.hf_dataset_config import HFDatasetSourceConfig

__all__ = [
    "ChatSFTPreprocessingConfig",
    "DatasetBuildContext",
    "DatasetProvider",
    "DirectHFSFTDatasetBuilder",
    "DirectHFSFTDatasetConfig",
    "FinetuningDatasetConfig",
    "GPTDatasetConfig",
    "GPTSFTDatasetBuilder",
    "GPTSFTDatasetConfig",
    "HFDatasetSourceConfig",
    "MockGPTDatasetConfig",
    "PromptCompletionSFTPreprocessingConfig",
    "SFTPreprocessingConfig",
]


def __getattr__(name: str) -> Any:
    """The builders, which import torch and the tokenizers, when they are asked for."""
    if name == "DirectHFSFTDatasetBuilder":
        from megatron.bridge.data.builders.direct_hf_sft import DirectHFSFTDatasetBuilder

        return DirectHFSFTDatasetBuilder
    if name == "GPTSFTDatasetBuilder":
        from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder

        return GPTSFTDatasetBuilder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
