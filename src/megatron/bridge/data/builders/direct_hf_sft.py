# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Builds finetuning datasets straight from a dataset of the hub, outside a run."""

from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
from megatron.bridge.data.direct_hf_config import DirectHFSFTDatasetConfig

__all__ = ["DirectHFSFTDatasetBuilder", "DirectHFSFTDatasetConfig"]


class DirectHFSFTDatasetBuilder(GPTSFTDatasetBuilder):
    """Builds the datasets of a `DirectHFSFTDatasetConfig`; nothing is written beside the data."""

    config_class = DirectHFSFTDatasetConfig
