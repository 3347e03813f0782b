# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A `GPTSFTDatasetConfig` to its three datasets: found, tokenised, cut and packed."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig
from megatron.bridge.data.finding import SPLITS, Shares, beside, find_sources
from megatron.bridge.data.packing import PackedDataset
from megatron.bridge.data.prepacked import PackedForm, PrepackedDataset, load_prepacked
from megatron.bridge.data.preprocessing_config import ChatSFTPreprocessingConfig
from megatron.bridge.data.sft import SFTDataset, load_sft_dataset
from megatron.bridge.data.sources import Source
from megatron.bridge.data.sources.hf_loading import token_directory
from megatron.bridge.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks

logger = logging.getLogger(__name__)

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
            raise ValueError("DatasetBuildContext.tokenizer is not set: SFT data needs the run's tokenizer")
        tokenizer = tokenizer_for(config, context.tokenizer)
        packed = {split: pattern for split, (_, pattern) in packed_files(config).items()}
    sources, shares = find_sources(config, tokenizer, packed=tuple(packed))
    if "training" in packed and sources and is_rank_0():
        logger.warning("%s", _other_data_than_the_packs(config, sources))
    samples = {
        split: load_samples(config, tokenizer, source, split=split, is_cut=shares is not None)
        for split, source in sources.items()
    }
    if shares is not None:
        with raise_on_all_ranks("cutting the data"):
            samples |= split_samples(config, samples["training"], shares)
    datasets: dict[str, Dataset] = {split: _packed(config, context, part, split) for split, part in samples.items()}
    datasets |= {split: _read_packed(config, context, split) for split in packed}
    return datasets.get("training"), datasets.get("validation"), datasets.get("test")


def _other_data_than_the_packs(config: GPTSFTDatasetConfig, sources: Iterable[str]) -> str:
    """What to know of a run that trains on packs, and takes other splits from elsewhere, as a recipe's own data."""
    option, _ = packed_files(config)["training"]
    data = f"hf_dataset={config.source.title}" if config.source else f"dataset_root={config.dataset_root}"
    return (
        f"{option} names packs to train on alone: {' and '.join(sources)} samples are those of dataset.{data}; name "
        "packs in packed_val_data_path, or set dataset.do_validation=false and dataset.do_test=false"
    )


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


def tokenizer_for(config: GPTSFTDatasetConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The run's tokenizer with the chat template, and its arguments, that `preprocessing` says.

    Raises:
        ValueError: The tokenizer has no chat templates, or the template is none.
    """
    chat = config.preprocessing
    if not isinstance(chat, ChatSFTPreprocessingConfig) or not (chat.chat_template or chat.chat_template_kwargs):
        return tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"dataset.preprocessing: tokenizer {tokenizer.name} has no chat template")
    return tokenizer.with_chat_template(chat.chat_template, chat.chat_template_kwargs)


def split_samples(config: GPTSFTDatasetConfig, samples: SFTDataset, shares: Shares) -> dict[str, SFTDataset]:
    """Cuts one dataset into the splits that are wanted: which sample goes where follows from the seed alone.

    Args:
        config: What is wanted.
        samples: The dataset.
        shares: Of training, validation and test; they add up to 1.

    Raises:
        ValueError: A split that has a share gets no sample.
    """
    order = np.random.RandomState(config.seed % 2**32).permutation(len(samples))
    ends = np.rint(np.cumsum(shares) * len(samples)).astype(int)
    parts = {split: np.sort(rows) for split, rows in zip(SPLITS, np.split(order, ends[:2]), strict=True)}
    for (split, rows), share in zip(parts.items(), shares, strict=True):
        if share and not len(rows):
            said = f"split={config.split!r}" if config.split is not None else f"hf_dataset.val_proportion={share}"
            raise ValueError(f"dataset.{said} leaves no {split} sample of {len(samples)}: change it")
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in parts.items())
    logger.info("%s: cut into %s samples", samples.report.path, sizes)
    parts["training"] = parts["training"][: config.max_train_samples]
    wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
    return {split: samples.part(rows) for split, rows in parts.items() if wanted[split] and len(rows)}


def load_samples(
    config: GPTSFTDatasetConfig, tokenizer: Tokenizer, source: Source, *, split: str, is_cut: bool
) -> SFTDataset:
    """The tokenised samples of a split's rows. Call on all ranks; an error ends all of them."""
    dataset = load_sft_dataset(
        source,
        tokenizer=tokenizer,
        seq_length=_longest_sample(config),
        options=config.options,
        max_samples=config.max_train_samples if split == "training" and not is_cut else None,
        num_processes=config.memmap_workers,
        cache_directory=_cache_directory(config),
        limit=config.limit_option,
    )
    logger.info("%s", dataset.report)
    for line in dataset.report.warnings:
        logger.warning("%s", line)
    return dataset


def _cache_directory(config: GPTSFTDatasetConfig) -> Path | None:
    """Where tokens are kept; None: nowhere."""
    if not config.keeps_tokens:
        return None
    if config.path_to_cache:
        return Path(config.path_to_cache)
    source = config.source
    return beside(config.root) / CACHE_DIRECTORY if source is None else token_directory(source, CACHE_DIRECTORY)


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
