# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Megatron-Core's indexed GPT datasets and its mock data, built by Core itself."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.bridge.data.config import DatasetBuildContext, GPTDatasetConfig
from megatron.bridge.data.validation_sets import names_of_sets


def build_gpt_datasets(config: GPTDatasetConfig, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
    """Builds the three datasets with Core's builder; all ranks must call it, because rank 0 writes index files first.

    Args:
        config: What to read; without a blend, Core's mock data.
        context: Numbers of samples to draw, and the tokenizer.

    Raises:
        FileNotFoundError: A blend names files that don't exist.
        ValueError: There is no tokenizer, a file is damaged, or Core's compiled index builder is missing.
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
    if context.train_samples is None and (blend := config.blend or (config.blend_per_split or [None])[0]) and blend[1]:
        raise ValueError(
            f"train.num_epochs with weights in dataset.blend ({blend[1]}): such a blend has no epochs; set "
            "train.train_iters instead, or leave the weights out"
        )
    if context.multiple_validation_sets:
        check_separate_validation(config)
    check_blend_files(config)
    check_cached_indices(config)
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
        multiple_validation_sets=context.multiple_validation_sets,
        full_validation=context.valid_samples is None,
    )
    sizes = [context.train_samples, context.valid_samples, context.test_samples]
    dataset_class = MockGPTDataset if core_config.mock else GPTDataset
    builder = BlendedMegatronDatasetBuilder(dataset_class, sizes, lambda: True, core_config)
    train, valid, test = builder.build()
    if context.multiple_validation_sets and config.blend_per_split and config.blend_per_split[1]:
        names = names_of_sets(context, config.blend_per_split[1][0])
        valid = dict(zip(names, valid if isinstance(valid, list) else [valid], strict=True))
    return train, valid, test


def check_separate_validation(config: GPTDatasetConfig) -> None:
    """Refuse what Core would evaluate as one set, or without the weights that it is given.

    Raises:
        ValueError: Says what to set.
    """
    blend = config.blend_per_split and config.blend_per_split[1]
    if not blend:
        raise ValueError(
            "validation.multiple_validation_sets=true without validation data of its own: name the sets in the second "
            "place of dataset.blend_per_split, or set validation.multiple_validation_sets=false"
        )
    if blend[1] is not None:
        raise ValueError(
            f"validation.multiple_validation_sets=true, and dataset.blend_per_split has the weights {blend[1]} for "
            "validation: sets that are evaluated by themselves have none; leave them out"
        )


def check_blend_files(config: GPTDatasetConfig) -> None:
    """Check the files of a blend before Core reads them, which fails with bare assertions.

    Raises:
        FileNotFoundError: Names the first .bin or .idx file that does not exist.
        ValueError: Names the first .idx file that is damaged.
    """
    for prefix in _prefixes(config):
        for suffix in (".idx", ".bin"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise FileNotFoundError(f"dataset.blend names {prefix}, but {prefix}{suffix} does not exist")
        _check_index(Path(f"{prefix}.idx"))


def _prefixes(config: GPTDatasetConfig) -> Iterator[str]:
    for blend in (config.blend, *(config.blend_per_split or [])):
        yield from blend[0] if blend else []


_INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Of an .idx file: magic, version, code of the token's dtype, number of sequences, number of documents."""


def _check_index(path: Path) -> None:
    """Refuse an index file with an invalid header, or one that is shorter than its header says."""
    from megatron.core.datasets.indexed_dataset import DType

    with open(path, "rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
    try:
        magic, version, code, sequences, documents = _INDEX_HEADER.unpack(header)
        DType.dtype_from_code(code)
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): expected an index that Megatron-Core wrote") from error
    needed = _INDEX_HEADER.size + 12 * sequences + 8 * documents
    if magic != b"MMIDIDX\x00\x00" or version != 1 or path.stat().st_size < needed:
        raise ValueError(
            f"{path} is damaged (magic {magic!r}, version {version}, {path.stat().st_size} bytes where its header asks "
            f"for {needed}): expected an index that Megatron-Core wrote"
        )


def check_cached_indices(config: GPTDatasetConfig) -> None:
    """Refuse cached arrays that hold pickled objects, since Core 0.16 would execute them.

    Raises:
        ValueError: Names the first such file.
    """
    caches = [config.path_to_cache] if config.path_to_cache else [f"{name}/cache" for name in _prefixes(config)]
    for path in (path for cache in caches for path in sorted(Path(cache).rglob("*.npy"))):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # damaged headers raise whatever they make the parser do
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} is no plain array ({reason}), and nothing of it was executed: expected an index that "
                "Megatron-Core wrote; remove it, and it is made again"
            ) from error
