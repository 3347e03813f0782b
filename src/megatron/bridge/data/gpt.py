# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Megatron-Core's indexed GPT datasets and its mock data, built by Core itself."""

from pathlib import Path
from typing import Any

from megatron.bridge.data.config import DatasetBuildContext, GPTDatasetConfig


def build_gpt_datasets(config: GPTDatasetConfig, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
    """Builds the three datasets with Core's builder; all ranks must call it, because rank 0 writes index files first.

    Args:
        config: What to read; without a blend, Core's mock data.
        context: Numbers of samples to draw, and the tokenizer.

    Raises:
        FileNotFoundError: A blend names files that don't exist.
        ValueError: There is no tokenizer, or Core's compiled index builder is missing.
    """
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"megatron-core's dataset helpers cannot be imported ({error}): install megatron-core from its wheel"
        ) from error
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig as CoreDatasetConfig

    if context.tokenizer is None:
        raise ValueError("DatasetBuildContext.tokenizer is not set: pretraining data needs the run's tokenizer")
    check_blend_files(config)
    core_config = CoreDatasetConfig(
        random_seed=config.random_seed,
        sequence_length=config.seq_length,
        blend=config.blend,
        blend_per_split=config.blend_per_split,
        split=config.split,
        path_to_cache=config.path_to_cache,
        num_dataset_builder_threads=config.num_dataset_builder_threads,
        mmap_bin_files=config.mmap_bin_files,
        tokenizer=context.tokenizer,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )
    sizes = [context.train_samples, context.valid_samples, context.test_samples]
    dataset_class = MockGPTDataset if core_config.mock else GPTDataset
    builder = BlendedMegatronDatasetBuilder(dataset_class, sizes, lambda: True, core_config)
    train, valid, test = builder.build()
    return train, valid, test


def check_blend_files(config: GPTDatasetConfig) -> None:
    """Raises FileNotFoundError naming the first .bin or .idx file of a blend that does not exist."""
    blends = [config.blend, *(config.blend_per_split or [])]
    for blend in blends:
        for prefix in blend[0] if blend else []:
            for suffix in (".idx", ".bin"):
                if not Path(f"{prefix}{suffix}").is_file():
                    raise FileNotFoundError(f"dataset.blend names {prefix}, but {prefix}{suffix} does not exist")
