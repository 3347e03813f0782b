# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A `GPTSFTDatasetConfig` to its three datasets: found, tokenised, split and packed."""

import logging
from pathlib import Path
from typing import TypeAlias

import numpy as np

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedDataset
from megatron.bridge.data.prepacked import PackedForm, PrepackedDataset, load_prepacked
from megatron.bridge.data.sft import SFTDataset, load_sft_dataset
from megatron.bridge.data.sft_options import read_shares
from megatron.bridge.data.sources import JsonlSource, Source, open_hf_dataset
from megatron.bridge.utils.distributed import all_gathered, raise_on_all_ranks

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")
HF_NAMES = {"training": "train", "validation": "validation", "test": "test"}
CACHE_DIRECTORY = ".tokens"

Dataset: TypeAlias = SFTDataset | PackedDataset | PrepackedDataset


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
        packed = {split: pattern for split, (_, pattern) in packed_files(config).items()}
        sources = find_sources(config, packed=tuple(packed))
    seen = all_gathered(sorted(sources))
    if any(names != seen[0] for names in seen):
        raise ValueError(f"the ranks see different files ({seen}): give every machine the same data")
    samples = {split: _load(config, context, source, split=split) for split, source in sources.items()}
    if config.split is not None:
        with raise_on_all_ranks("cutting the data"):
            samples = split_samples(config, samples["training"])
    datasets: dict[str, Dataset] = {split: _packed(config, context, part, split) for split, part in samples.items()}
    datasets |= {split: _read_packed(config, context, split) for split in packed}
    return datasets.get("training"), datasets.get("validation"), datasets.get("test")


def packed_files(config: GPTSFTDatasetConfig) -> dict[str, tuple[str, str]]:
    """The option that names the rows of a split that were packed beforehand, and its value, by split."""
    specs, found = config.packing, {}
    if specs is None:
        return {}
    where = f"dataset.{'packed_sequence_specs' if specs is config.packed_sequence_specs else 'offline_packing_specs'}"
    if specs.packed_train_data_path is not None:
        found["training"] = f"{where}.packed_train_data_path", specs.packed_train_data_path
    if specs.packed_val_data_path is not None and config.do_validation:
        found["validation"] = f"{where}.packed_val_data_path", specs.packed_val_data_path
    return found


def find_sources(config: GPTSFTDatasetConfig, *, packed: tuple[str, ...] = ()) -> dict[str, Source]:
    """Returns where the rows of each split that is wanted come from; with `split`, all of them come from training.

    Args:
        config: Where the data lies.
        packed: Splits whose rows were packed beforehand; nothing else of them is looked for.

    Raises:
        FileNotFoundError: The directory, or a split that must be there, is missing.
        ValueError: `split` is set, and there are separate splits.
    """
    found: dict[str, Source] = {}
    if "training" in packed and config.dataset_root is None and config.hf_dataset is None:
        return found
    root = config.root
    if config.hf_dataset is not None:
        opened = open_hf_dataset(config.hf_dataset)
        found |= {"training": opened[None]} if None in opened else {}
        found |= {split: opened[name] for split, name in HF_NAMES.items() if name in opened}
        names = HF_NAMES
    else:
        names = {split: f"{split}.jsonl" for split in SPLITS}
        if not root.exists():
            raise FileNotFoundError(f"dataset.dataset_root={str(root)!r} is no directory: expected training.jsonl in it")
        found = {"training": JsonlSource(root)} if root.is_file() else {split: JsonlSource(root / names[split]) for split in SPLITS if (root / names[split]).exists()}
    if "training" not in found and "training" not in packed:
        raise FileNotFoundError(f"{root / names['training']} does not exist: expected the training data")
    found = {split: source for split, source in found.items() if split not in packed}
    separate = [names[split] for split in SPLITS[1:] if split in found]
    if config.split is not None:
        if separate:
            raise ValueError(
                f"dataset.split={config.split!r} cuts {found['training']}, but {root} has {separate[0]} too: remove it, "
                "or unset dataset.split"
            )
        return found
    if config.do_validation and "validation" not in (*found, *packed):
        raise FileNotFoundError(
            f"{_beside(root) / names['validation']} does not exist: add it, cut it off with dataset.split, or set "
            "dataset.do_validation=false"
        )
    if config.do_test and "test" not in found:
        path = _beside(root) / names["test"]
        logger.warning("%s does not exist: there is no test set (dataset.do_test=false says so too)", path)
    wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
    return {split: source for split, source in found.items() if wanted[split]}


def _beside(root: Path) -> Path:
    """The directory of the data, which may be a single file."""
    return root.parent if root.is_file() else root


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
        seq_length=_longest_sample(config),
        options=config.options,
        max_samples=config.max_train_samples if split == "training" and config.split is None else None,
        num_processes=config.memmap_workers,
        cache_directory=config.path_to_cache or _beside(root) / CACHE_DIRECTORY,
        limit=config.limit_option,
    )
    logger.info("%s", dataset.report)
    for line in dataset.report.warnings:
        logger.warning("%s", line)
    return dataset


def _longest_sample(config: GPTSFTDatasetConfig) -> int:
    """Most positions of a sample: it must fit into a row when it is padded, too."""
    if config.pack_size is None or config.packing is None:
        return config.seq_length
    return config.pack_size // config.packing.pad_seq_to_mult * config.packing.pad_seq_to_mult


def _read_packed(config: GPTSFTDatasetConfig, context: DatasetBuildContext, split: str) -> PrepackedDataset:
    """Rows that were packed beforehand."""
    assert config.packing is not None and config.pack_size is not None
    option, pattern = packed_files(config)[split]
    form = PackedForm(
        size=config.pack_size,
        size_option=f"dataset.{config.limit_option}",
        vocab_size=context.tokenizer.max_token_id + 1,
        multiple_of=config.packing.pad_seq_to_mult,
    )
    packed = load_prepacked(pattern, option, form=form, metadata_path=config.packing.packed_metadata_path)
    logger.info("%s: %s", pattern, packed.report)
    return packed


def _packed(config: GPTSFTDatasetConfig, context: DatasetBuildContext, samples: SFTDataset, split: str) -> Dataset:
    if config.pack_size is None or config.packing is None:
        return samples
    packed = PackedDataset(
        samples,
        size=config.pack_size,
        seed=config.seed,
        keep_order=not config.is_shuffled,
        multiple_of=config.packing.pad_seq_to_mult,
        pad_id=context.tokenizer.pad_id,
    )
    logger.info("%s samples: %s", split, packed.report)
    return packed
