# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Configuration of data and tokenizer: plain dataclasses, checked by `finalize()`, without heavy imports."""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron.bridge.data.build_context import DatasetBuildContext
from megatron.bridge.data.preprocessing_config import ChatSFTPreprocessingConfig, PromptCompletionSFTPreprocessingConfig
from megatron.bridge.data.sft_options import (
    PackedSequenceSpecs,
    SFTOptions,
    check_blend,
    check_blends_per_split,
    check_positive,
    read_shares,
)
from megatron.bridge.data.sft_rules import check_blends, check_packing
from megatron.bridge.data.sources.hf_dataset_config import HFDatasetSourceConfig
from megatron.bridge.utils.section import BridgeSection, Section


@dataclass(kw_only=True)
class DataloaderConfig(BridgeSection):
    """How samples reach the training loop; the base of every dataset configuration."""

    _section = "dataset"

    dataloader_type: Literal["single", "cyclic", "batch"] = "single"
    """Order of the training samples: "single" as they are stored, "cyclic" and "batch" shuffled again each epoch."""

    num_workers: int = 0
    """Processes that read samples ahead. 0 reads in the training process: right for SFT data, tokenised up front."""

    pin_memory: bool = True
    """Whether to put batches in page-locked memory; has no effect without a GPU."""

    @property
    def is_shuffled(self) -> bool:
        """Whether training samples come in a new order each epoch."""
        return self.dataloader_type != "single"

    def finalize(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field's value cannot work.
        """
        if self.dataloader_type not in ("single", "cyclic", "batch"):
            expected = "expected 'single', 'cyclic' or 'batch'"
            raise ValueError(f"dataset.dataloader_type={self.dataloader_type!r} is not supported: {expected}")
        if self.num_workers < 0:
            raise ValueError(f"dataset.num_workers={self.num_workers}: expected 0 or more")


@dataclass
class GPTSFTDatasetConfig(DataloaderConfig):
    """Supervised finetuning on `training.jsonl`, `validation.jsonl` and `test.jsonl` in one directory."""

    keeps_tokens: ClassVar[bool] = True
    """Whether tokens are kept on disk for later runs."""

    seq_length: int
    """Longest sample in tokens; equal to the model's `seq_length`."""

    _: KW_ONLY

    dataset_root: str | None = None
    """Directory that holds the JSONL files. Where it is set, `hf_dataset` isn't read."""

    seed: int = 1234
    """Seed of the training order."""

    max_train_samples: int | None = None
    """Use only this many of the first training samples. None: all."""

    dataset_kwargs: dict[str, Any] | None = None
    """Format of the lines; the keys are the fields of `SFTOptions`."""

    do_validation: bool = True
    """Whether validation.jsonl is read; it must exist then."""

    do_test: bool = True
    """Whether test.jsonl is read, if it exists."""

    dataloader_type: Literal["single", "cyclic", "batch"] = "batch"
    """Order of the training samples: "batch" and "cyclic" shuffle again each epoch, "single" keeps the file's order."""

    memmap_workers: int = 1
    """Processes that tokenise. 1: the training process, whose tokenizer uses all threads. More help with big chats."""

    path_to_cache: str | None = None
    """Directory of the token cache. None: `.tokens` beside the data."""

    split: str | None = None
    """Shares of training, validation and test, such as "90,10,0", that training.jsonl is cut into, by `seed`. None:
    each has a file of its own."""

    packed_sequence_specs: PackedSequenceSpecs | None = None
    """Pack samples into rows of `packed_sequence_size`; -1: don't. None: as the next two fields say."""

    enable_offline_packing: bool = False
    """Whether to pack samples into rows."""

    offline_packing_specs: PackedSequenceSpecs | None = None
    """With `enable_offline_packing`: the rows. None, or a `packed_sequence_size` of -1: rows of `seq_length`."""

    hf_dataset: str | HFDatasetSourceConfig | None = None
    """Where there is no `dataset_root`: a dataset of the Hugging Face hub, by its name or a short one (`squad`), or a
    local copy of one, such as a directory that the `datasets` library's `save_to_disk` wrote."""

    blend: tuple[list[str], list[float] | None] | None = None
    """In place of `dataset_root`: several such directories (or JSONL files, or what `save_to_disk` wrote), and how
    often training takes a sample of each. Weights None: each sample once an epoch."""

    blend_per_split: list[tuple[list[str], list[float] | None] | None] | None = None
    """In place of `blend`: one each for training, validation and test. Only training's may have weights."""

    preprocessing: PromptCompletionSFTPreprocessingConfig | ChatSFTPreprocessingConfig | None = None
    """How rows become samples, in place of the keys of `dataset_kwargs` that say the same. None: as those say."""

    @property
    def pack_size(self) -> int | None:
        """Positions of a row that packs several samples; None: each row is one sample."""
        specs = self.packing
        if specs is None or (
            specs is self.packed_sequence_specs and not specs.are_read and specs.packed_sequence_size < 1
        ):
            return None
        return specs.packed_sequence_size if specs.packed_sequence_size > 0 else self.seq_length

    @property
    def packing(self) -> PackedSequenceSpecs | None:
        """How samples are packed, wherever it is set; see `pack_size` for whether they are."""
        if self.packed_sequence_specs is not None or not self.enable_offline_packing:
            return self.packed_sequence_specs
        return self.offline_packing_specs or PackedSequenceSpecs()

    @property
    def limit_option(self) -> str:
        """The option that limits a sample's length, for messages."""
        if self.packed_sequence_specs is not None and self.packed_sequence_specs.packed_sequence_size > 0:
            return "packed_sequence_specs.packed_sequence_size"
        if self.pack_size is None or self.pack_size == self.seq_length:
            return "seq_length"
        return "offline_packing_specs.packed_sequence_size"

    @property
    def root(self) -> Path:
        """The directory of the JSONL files.

        Raises:
            ValueError: It is not set.
        """
        if not self.dataset_root:
            raise ValueError(
                "dataset.dataset_root is not set: expected the directory that holds training.jsonl, or "
                "dataset.hf_dataset"
            )
        return Path(self.dataset_root)

    @property
    def source(self) -> HFDatasetSourceConfig | None:
        """The dataset of `hf_dataset`, with what is known of it; None where the rows are in `dataset_root`.

        Raises:
            ValueError: A field of it can't work.
        """
        if self.dataset_root or self.hf_dataset is None:
            return None
        said = HFDatasetSourceConfig(self.hf_dataset) if isinstance(self.hf_dataset, str) else self.hf_dataset
        said.check()
        known = said.with_preset()
        if self.preprocessing is not None and self.preprocessing.names_columns:
            return replace(known, process_example_fn=said.process_example_fn)
        return known

    @property
    def options(self) -> SFTOptions:
        """The checked options in `dataset_kwargs` and `preprocessing`.

        Raises:
            ValueError: A key is unknown, a value can't work, or the two contradict each other.
        """
        said = dict(self.dataset_kwargs or {})
        meant = {} if self.preprocessing is None else self.preprocessing.sft_options()
        for key, value in meant.items():
            if said.get(key) is not None and said[key] != value:
                raise ValueError(
                    f"dataset.dataset_kwargs.{key}={said[key]!r} and dataset.preprocessing, which means {value!r}: "
                    "they contradict each other; leave one of them out"
                )
        return SFTOptions.from_kwargs(said | meant)

    def finalize(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field's value cannot work, or names something that is not supported.
        """
        super().finalize()
        kinds = (PromptCompletionSFTPreprocessingConfig, ChatSFTPreprocessingConfig)
        if self.preprocessing is not None and not isinstance(self.preprocessing, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"dataset.preprocessing={self.preprocessing!r}: expected {expected}")
        if self.hf_dataset is not None and not isinstance(self.hf_dataset, str | HFDatasetSourceConfig):
            expected = "expected a dataset's name, or HFDatasetSourceConfig"
            raise ValueError(f"dataset.hf_dataset={self.hf_dataset!r}: {expected}")
        if self.split is not None:
            read_shares(self.split)
        check_positive("dataset.seq_length", self.seq_length)
        check_positive("dataset.memmap_workers", self.memmap_workers)
        if self.max_train_samples is not None:
            check_positive("dataset.max_train_samples", self.max_train_samples)
        _ = self.options
        check_packing(self)
        check_blends(self)


FinetuningDatasetConfig = GPTSFTDatasetConfig


@dataclass
class GPTDatasetConfig(DataloaderConfig):
    """Pretraining on Megatron-Core's indexed datasets (.bin and .idx files), blended and cut by Core."""

    seq_length: int
    """Length of each sample in tokens; equal to the model's `seq_length`."""

    _: KW_ONLY

    random_seed: int = 1234
    """Seed of Core's shuffling and blending."""

    blend: tuple[list[str], list[float] | None] | None = None
    """Path prefixes and weights (None: by size), cut by `split`. None here and below: Core's mock data."""

    blend_per_split: list[tuple[list[str], list[float] | None] | None] | None = None
    """One blend each for training, validation and test."""

    split: str | None = None
    """Shares of training, validation and test, such as "99,1,0"; needed with `blend`."""

    path_to_cache: str | None = None
    """Directory for Core's index files. None: beside the data."""

    num_dataset_builder_threads: int = 1
    """Threads that build the datasets of a blend."""

    mmap_bin_files: bool = True
    """Whether to map .bin files into memory."""

    reset_position_ids: bool = False
    """Whether positions start at 0 after each end of document."""

    eod_mask_loss: bool = False
    """Whether the end of document is not learned."""

    reset_attention_mask: bool = False
    """Not supported: attention is causal over the whole sample."""

    skip_getting_attention_mask_from_dataset: bool = True
    """Accepted: the attention mask is never made by the dataset."""

    @property
    def sequence_length(self) -> int:
        """Core's name for `seq_length`."""
        return self.seq_length

    @property
    def seed(self) -> int:
        """Seed of the training order, where this package shuffles."""
        return self.random_seed

    def finalize(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field's value cannot work, or names something that is not supported.
        """
        super().finalize()
        check_positive("dataset.seq_length", self.seq_length)
        if self.reset_attention_mask:
            message = "is not supported: attention is causal over the whole sample; set it to false"
            raise ValueError(f"dataset.reset_attention_mask=True {message}")
        if not self.skip_getting_attention_mask_from_dataset:
            message = "is not supported: attention masks are never made by the dataset; leave it at true"
            raise ValueError(f"dataset.skip_getting_attention_mask_from_dataset=False {message}")
        if self.blend is not None and self.blend_per_split is not None:
            raise ValueError("dataset.blend and dataset.blend_per_split are both set: set one of them")
        if self.blend is not None:
            check_blend("dataset.blend", self.blend)
        if self.blend_per_split is not None:
            check_blends_per_split(self.blend_per_split)
        if self.blend is not None and self.split is None:
            raise ValueError('dataset.blend is set but dataset.split is not: expected shares such as "99,1,0"')


@dataclass
class MockGPTDatasetConfig(GPTDatasetConfig):
    """Megatron-Core's mock data: counting tokens, for trials and tests."""

    def finalize(self) -> None:
        """Checks the fields; raises ValueError if one names real data or cannot work."""
        if self.blend is not None or self.blend_per_split is not None:
            raise ValueError("dataset.blend is set on mock data: use GPTDatasetConfig for real data")
        super().finalize()


@dataclass
class TokenizerConfig(Section):
    """Which tokenizer turns text into tokens."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    """ "HuggingFaceTokenizer", or "NullTokenizer" for data that is numbers already."""

    tokenizer_model: str | None = None
    """Directory with the Hugging Face tokenizer's files, or a name on the hub."""

    vocab_size: int | None = None
    """Size of the NullTokenizer's vocabulary; a Hugging Face tokenizer knows its own."""

    chat_template: str | None = None
    """Jinja text, or the path of a file that holds it, used instead of the tokenizer's own chat template. None: the
    tokenizer's own."""

    hf_tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments for `AutoTokenizer.from_pretrained`, such as `revision`. `trust_remote_code` is taken, but code
    of a model's directory is never run: a tokenizer that needs it is refused."""

    def finalize(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: The type is unknown, or a field that it needs is not set.
        """
        if self.tokenizer_type not in ("HuggingFaceTokenizer", "NullTokenizer"):
            expected = "expected 'HuggingFaceTokenizer' or 'NullTokenizer'"
            raise ValueError(f"tokenizer.tokenizer_type={self.tokenizer_type!r} is not supported: {expected}")
        if self.tokenizer_type == "HuggingFaceTokenizer" and not self.tokenizer_model:
            raise ValueError("tokenizer.tokenizer_model is not set: expected a directory with tokenizer.json")
        if self.tokenizer_type == "NullTokenizer" and self.vocab_size is None:
            raise ValueError("tokenizer.vocab_size is not set: NullTokenizer needs the number of tokens")
        if self.vocab_size is not None:
            check_positive("tokenizer.vocab_size", self.vocab_size)


@dataclass(kw_only=True)
class DatasetProvider(DataloaderConfig, ABC):
    """Base of a user's own dataset configuration.

    `build_datasets` returns (train, valid, test) map-style datasets, None for one that is not wanted. An item is a
    dict of 1-D tensors of one length, at most the model's `seq_length`: `tokens` and `labels` (int64; labels already
    shifted), `loss_mask` (float32) and, if positions are not 0, 1, 2, ..., `position_ids` (int64). A dataset with an
    attribute `lengths` (one item length each) is padded to the longest sample of a batch, another to
    `seq_length`. An item that packs samples has `cu_seqlens`, see `data/packing.py`, and its dataset `is_packed` True.
    Every rank builds the same datasets.
    """

    seed: int = 1234
    """Seed of the training order, if `dataloader_type` shuffles."""

    @abstractmethod
    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any | None, Any | None, Any | None]:
        """Returns the training, validation and test datasets; None for one that is not wanted."""
