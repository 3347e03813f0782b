# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The datasets of a configuration, and what a run says to them."""

from typing import Any

from megatron.bridge.data.blends import build_blended_datasets
from megatron.bridge.data.config import DatasetBuildContext, DatasetProvider, GPTDatasetConfig, GPTSFTDatasetConfig
from megatron.bridge.data.sft_datasets import build_sft_datasets

Datasets = tuple[Any | None, Any | None, Any | None]
DatasetConfig = GPTSFTDatasetConfig | GPTDatasetConfig | DatasetProvider


def build_datasets(config: DatasetConfig, context: DatasetBuildContext) -> Datasets:
    """Builds the training, validation and test datasets; None for one that is not wanted.

    Must be called on all ranks. An error in reading JSONL files ends all of them.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The configuration or a file cannot be used.
    """
    if not isinstance(config, GPTSFTDatasetConfig | GPTDatasetConfig | DatasetProvider):
        raise ValueError(
            f"dataset is a {type(config).__name__}: expected GPTSFTDatasetConfig, GPTDatasetConfig, "
            "MockGPTDatasetConfig or a DatasetProvider"
        )
    config.finalize()
    if isinstance(config, GPTSFTDatasetConfig):
        is_blend = config.blend is not None or config.blend_per_split is not None
        return build_blended_datasets(config, context) if is_blend else build_sft_datasets(config, context)
    if isinstance(config, GPTDatasetConfig):
        from megatron.bridge.data.gpt import build_gpt_datasets

        return build_gpt_datasets(config, context)
    datasets = config.build_datasets(context)
    if not isinstance(datasets, tuple | list) or len(datasets) != 3:
        name = type(config).__name__
        raise ValueError(
            f"{name}.build_datasets returned {type(datasets).__name__}: expected a tuple of three datasets"
        )
    training, validation, test = datasets
    return training, validation, test


def context_of_run(cfg: Any, derived: Any, tokenizer: Any) -> DatasetBuildContext:
    """What the data may need to know about a run: its `ConfigContainer`, what was derived from it, its tokenizer."""
    return DatasetBuildContext(
        train_samples=None if cfg.train.num_epochs is not None else derived.train_samples,
        valid_samples=derived.valid_samples,
        test_samples=derived.test_samples,
        tokenizer=tokenizer,
        multiple_validation_sets=cfg.validation.multiple_validation_sets,
        validation_set_names=tuple(cfg.validation.validation_set_names or ()) or None,
    )
