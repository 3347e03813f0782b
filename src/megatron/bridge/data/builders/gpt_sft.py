# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Builds finetuning datasets outside a run: from a configuration, or from its fields."""

from typing import Any

from megatron.bridge.data.build import Datasets, build_datasets
from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig
from megatron.bridge.data.tokenizer import HuggingFaceTokenizer, Tokenizer

__all__ = ["GPTSFTDatasetBuilder", "build_gpt_sft_split"]

_SPLITS = {
    "training": 0,
    "train": 0,
    "validation": 1,
    "valid": 1,
    "val": 1,
    "test": 2,
}


class GPTSFTDatasetBuilder:
    """Builds the datasets of one configuration.

    Attributes:
        config: The configuration.
        tokenizer: What its text is tokenised with.
    """

    config_class: type[GPTSFTDatasetConfig] = GPTSFTDatasetConfig

    def __init__(
        self, config: GPTSFTDatasetConfig | None = None, tokenizer: Tokenizer | Any = None, **fields: Any
    ) -> None:
        """Keeps the configuration; nothing is read yet.

        Args:
            config: The configuration. None: it is made of `fields`.
            tokenizer: As made by `build_tokenizer`, or a fast one of transformers.
            fields: Fields of the configuration, such as `dataset_root` and `seq_length`.

        Raises:
            ValueError: There is no tokenizer, or a configuration and fields are both given.
        """
        if config is not None and fields:
            raise ValueError(f"a configuration and {', '.join(fields)} are both given: expected one of them")
        if tokenizer is None:
            raise ValueError("tokenizer is not set: expected one, as made by build_tokenizer")
        self.config = self.config_class(**fields) if config is None else config
        if not isinstance(self.config, self.config_class):
            found = type(self.config).__name__
            raise ValueError(f"config is a {found}: expected {self.config_class.__name__}")
        self.tokenizer = as_tokenizer(tokenizer)

    def prepare_data(self) -> None:
        """Tokenises the data and keeps the tokens for later, where the configuration does. Call on all ranks."""
        self.build()

    def build(self) -> Datasets:
        """The training, validation and test datasets; None for one that isn't wanted. Call on all ranks.

        Raises:
            FileNotFoundError: The data, or a split of it, is missing.
            ValueError: The configuration or the data can't be used.
        """
        return build_datasets(self.config, DatasetBuildContext(0, None, None, self.tokenizer))


def build_gpt_sft_split(config: GPTSFTDatasetConfig, tokenizer: Tokenizer | Any, split: str = "training") -> Any:
    """One of a configuration's datasets; None where it isn't wanted. Call on all ranks.

    Args:
        config: The configuration.
        tokenizer: As made by `build_tokenizer`, or a fast one of transformers.
        split: "training", "validation" or "test".

    Raises:
        FileNotFoundError: The data, or a split of it, is missing.
        ValueError: Another split, or the configuration or the data can't be used.
    """
    if split not in _SPLITS:
        raise ValueError(f"split={split!r}: expected training, validation or test")
    return GPTSFTDatasetBuilder(config, tokenizer).build()[_SPLITS[split]]


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of transformers as one of ours; ours by itself.

    Raises:
        ValueError: It gives no character offsets.
    """
    if hasattr(tokenizer, "encode_batch") or not hasattr(tokenizer, "is_fast"):
        return tokenizer
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {tokenizer.name_or_path} has no offsets: expected its fast version")
    return HuggingFaceTokenizer(tokenizer, tokenizer.name_or_path)
