# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A `GPTSFTDatasetConfig` to its three datasets: found, tokenised, split and packed."""

import logging
from typing import TypeAlias

import numpy as np

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedDataset
from megatron.bridge.data.sft import SFTDataset, load_sft_dataset
from megatron.bridge.data.sft_options import read_shares
from megatron.bridge.data.sources import JsonlSource, Source, open_hf_dataset
from megatron.bridge.utils.distributed import all_gathered, raise_on_all_ranks

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")
HF_NAMES = {"training": "train", "validation": "validation", "test": "test"}
CACHE_DIRECTORY = ".tokens"

Dataset: TypeAlias = SFTDataset | PackedDataset


def build_sft_datasets(
    config: GPTSFTDatasetConfig, context: DatasetBuildContext
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Builds the training, validation and test datasets; None for one that is not wanted. Call on all ranks.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The configuration or a file cannot be used.
    """
    with raise_on_all_ranks("finding the data"):
        if context.tokenizer is None:
            raise ValueError("DatasetBuildContext.tokenizer is not set: JSONL data needs the run's tokenizer")
        sources = find_sources(config)
    seen = all_gathered(sorted(sources))
    if any(names != seen[0] for names in seen):
        raise ValueError(f"the ranks see different files ({seen}): give every machine the same data")
    samples = {split: _load(config, context, source, split=split) for split, source in sources.items()}
    if config.split is not None:
        with raise_on_all_ranks("cutting the data"):
            samples = split_samples(config, samples["training"])
    training, validation, test = (
        _packed(config, samples[split], split) if split in samples else None for split in SPLITS
    )
    return training, validation, test


def find_sources(config: GPTSFTDatasetConfig) -> dict[str, Source]:
    """Returns where the rows of each split that is wanted come from; with `split`, all of them come from training.

    Raises:
        FileNotFoundError: The directory, or a split that must be there, is missing.
        ValueError: `split` is set, and there are separate splits.
    """
    found: dict[str, Source] = {}
    root = config.root
    if config.hf_dataset is not None:
        opened = open_hf_dataset(config.hf_dataset)
        found |= {"training": opened[None]} if None in opened else {}
        found |= {split: opened[name] for split, name in HF_NAMES.items() if name in opened}
        names = HF_NAMES
    else:
        names = {split: f"{split}.jsonl" for split in SPLITS}
        if not root.is_dir():
            raise FileNotFoundError(f"dataset.dataset_root={str(root)!r} is no directory: expected training.jsonl in it")
        found = {split: JsonlSource(root / names[split]) for split in SPLITS if (root / names[split]).exists()}
    if "training" not in found:
        raise FileNotFoundError(f"{root / names['training']} does not exist: expected the training data")
    separate = [names[split] for split in SPLITS[1:] if split in found]
    if config.split is not None:
        if separate:
            raise ValueError(
                f"dataset.split={config.split!r} cuts {found['training']}, but {root} has {separate[0]} too: remove it, "
                "or unset dataset.split"
            )
        return found
    if config.do_validation and "validation" not in found:
        raise FileNotFoundError(
            f"{root / names['validation']} does not exist: add it, cut it off with dataset.split, or set "
            "dataset.do_validation=false"
        )
    if config.do_test and "test" not in found:
        path = root / names["test"]
        logger.warning("%s does not exist: there is no test set (dataset.do_test=false says so too)", path)
    wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
    return {split: source for split, source in found.items() if wanted[split]}


def split_samples(config: GPTSFTDatasetConfig, samples: SFTDataset) -> dict[str, SFTDataset]:
    """Cuts one dataset into the splits that are wanted: which sample goes where follows from the seed alone.

    Raises:
        ValueError: A split that has a share gets no sample.
    """
    shares = read_shares(config.split)
    order = np.random.RandomState(config.seed % 2**32).permutation(len(samples))
    ends = np.rint(np.cumsum(shares) * len(samples)).astype(int)
    parts = {split: np.sort(rows) for split, rows in zip(SPLITS, np.split(order, ends[:2]), strict=True)}
    for (split, rows), share in zip(parts.items(), shares, strict=True):
        if share and not len(rows):
            raise ValueError(f"dataset.split={config.split!r} leaves no {split} sample of {len(samples)}: change it")
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in parts.items())
    logger.info("%s: cut into %s samples", samples.report.path, sizes)
    parts["training"] = parts["training"][: config.max_train_samples]
    wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
    return {split: samples.part(rows) for split, rows in parts.items() if wanted[split] and len(rows)}


def _load(config: GPTSFTDatasetConfig, context: DatasetBuildContext, source: Source, *, split: str) -> SFTDataset:
    root = config.root
    dataset = load_sft_dataset(
        source,
        tokenizer=context.tokenizer,
        seq_length=config.pack_size or config.seq_length,
        options=config.options,
        max_samples=config.max_train_samples if split == "training" and config.split is None else None,
        num_processes=config.memmap_workers,
        cache_directory=config.path_to_cache or root / CACHE_DIRECTORY,
        limit=config.limit_option,
    )
    logger.info("%s", dataset.report)
    for line in dataset.report.warnings:
        logger.warning("%s", line)
    return dataset


def _packed(config: GPTSFTDatasetConfig, samples: SFTDataset, split: str) -> Dataset:
    if config.pack_size is None:
        return samples
    packed = PackedDataset(samples, size=config.pack_size, seed=config.seed, keep_order=not config.is_shuffled)
    logger.info("%s samples: %s", split, packed.report)
    return packed
