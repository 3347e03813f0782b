# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the user says about data and tokenizer: plain dataclasses, checked by `finalize()`, without heavy imports."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Literal


@dataclass(kw_only=True)
class DataloaderConfig:
    """How samples reach the training loop; the base of every dataset configuration."""

    dataloader_type: Literal["single", "cyclic", "batch"] = "single"
    """Order of the training samples: "single" as they are stored, "cyclic" and "batch" shuffled anew each epoch."""

    num_workers: int = 0
    """Processes that read samples ahead. 0 reads in the training process: right for SFT data, tokenised up front."""

    pin_memory: bool = True
    """Whether to put batches in page-locked memory; without effect where there is no GPU."""

    persistent_workers: bool = False
    """Accepted: the workers always live as long as the iterator."""

    data_sharding: bool = True
    """Accepted: each data-parallel rank reads its own slice of every global batch."""

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


@dataclass(frozen=True, kw_only=True)
class SFTOptions:
    """The keys that `GPTSFTDatasetConfig.dataset_kwargs` may hold, with their defaults."""

    chat: bool | None = None
    """Whether lines are conversations. None: yes if the first line has `messages` or `conversations`."""

    use_hf_tokenizer_chat_template: bool = True
    """Conversations are always rendered by the tokenizer's own chat template."""

    prompt_template: str = "{input} {output}"
    """How a line becomes text; it ends with the answer's field, and a space before it belongs to the answer."""

    label_key: str = "output"
    """The field that holds the answer."""

    truncation_field: str = "input"
    """The field that is shortened when a sample is longer than `seq_length`."""

    truncation_method: Literal["left", "right"] = "right"
    """The end of the truncation field that is cut off."""

    answer_only_loss: bool = True
    """Whether only the answer (in a conversation: the assistant's turns) is learned."""

    add_bos: bool = False
    """Whether the tokenizer's BOS precedes an input/output sample (a chat template decides for itself)."""

    add_eos: bool = True
    """Whether the tokenizer's EOS follows an input/output sample (a chat template decides for itself)."""

    pad_to_max_length: bool = False
    """Whether every batch is padded to `seq_length` instead of its longest sample."""

    pad_seq_length_to_mult: int = 16
    """The length of a batch is rounded up to a multiple of this many tokens, but not beyond `seq_length`."""

    @classmethod
    def from_kwargs(cls, kwargs: dict[str, Any] | None) -> "SFTOptions":
        """Builds the options from `dataset_kwargs`.

        Raises:
            ValueError: A key is unknown or a value cannot work.
        """
        kwargs = dict(kwargs or {})
        check_known_keys(kwargs, [item.name for item in fields(cls)], where="dataset.dataset_kwargs")
        options = cls(**kwargs)
        options.check()
        return options

    def check(self) -> None:
        """Raises ValueError if a value cannot work."""
        where = "dataset.dataset_kwargs"
        flags = ("use_hf_tokenizer_chat_template", "answer_only_loss", "add_bos", "add_eos", "pad_to_max_length")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{where}.{name}={getattr(self, name)!r}: expected true or false")
        if self.chat not in (None, True, False):
            raise ValueError(f"{where}.chat={self.chat!r}: expected true, false or null")
        for name in ("prompt_template", "label_key", "truncation_field"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{where}.{name}={getattr(self, name)!r}: expected a string")
        if not self.use_hf_tokenizer_chat_template:
            raise ValueError(f"{where}.use_hf_tokenizer_chat_template=False is not supported: leave it at true")
        if self.truncation_method not in ("left", "right"):
            raise ValueError(f"{where}.truncation_method={self.truncation_method!r}: expected 'left' or 'right'")
        multiple = self.pad_seq_length_to_mult
        if not isinstance(multiple, int) or multiple < 1:
            raise ValueError(f"{where}.pad_seq_length_to_mult={multiple!r}: expected an integer of 1 or more")


@dataclass
class GPTSFTDatasetConfig(DataloaderConfig):
    """Supervised finetuning on `training.jsonl`, `validation.jsonl` and `test.jsonl` in one directory."""

    seq_length: int
    """Longest sample in tokens; equal to the model's `seq_length`."""

    _: KW_ONLY

    dataset_root: str | None = None
    """Directory that holds the JSONL files; required."""

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
    """Order of the training samples: "batch" and "cyclic" shuffle anew each epoch, "single" keeps the file's order."""

    memmap_workers: int = 1
    """Accepted: files are read once, and the tokenizer uses all threads."""

    packed_sequence_specs: Any = None
    """Not supported: packing several samples in one sequence."""

    enable_offline_packing: bool = False
    """Not supported: packing several samples in one sequence."""

    offline_packing_specs: Any = None
    """Not supported: packing several samples in one sequence."""

    hf_dataset: Any = None
    """Not supported: data from a hub."""

    preprocessing: Any = None
    """Not supported: write JSONL lines instead."""

    @property
    def options(self) -> SFTOptions:
        """The checked options in `dataset_kwargs`."""
        return SFTOptions.from_kwargs(self.dataset_kwargs)

    def finalize(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field's value cannot work, or names something that is not supported.
        """
        super().finalize()
        packing = "packing is not supported yet: leave it unset; batches are padded to their longest sample"
        refused = {
            "packed_sequence_specs": packing,
            "enable_offline_packing": packing,
            "offline_packing_specs": packing,
            "hf_dataset": "data from a hub is not supported: write JSONL files and set dataset.dataset_root",
            "preprocessing": "preprocessing is not supported: write JSONL files and set dataset.dataset_root",
        }
        for name, message in refused.items():
            if getattr(self, name):
                raise ValueError(f"dataset.{name}={getattr(self, name)!r}: {message}")
        if self.dataset_root is None:
            raise ValueError("dataset.dataset_root is not set: expected the directory that holds training.jsonl")
        check_positive("dataset.seq_length", self.seq_length)
        if self.max_train_samples is not None:
            check_positive("dataset.max_train_samples", self.max_train_samples)
        _ = self.options


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
class TokenizerConfig:
    """Which tokenizer turns text into tokens."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    """ "HuggingFaceTokenizer", or "NullTokenizer" for data that is numbers already."""

    tokenizer_model: str | None = None
    """Directory with the Hugging Face tokenizer's files (or a hub name)."""

    vocab_size: int | None = None
    """Size of the NullTokenizer's vocabulary; a Hugging Face tokenizer knows its own."""

    chat_template: str | None = None
    """Jinja text used instead of the tokenizer's own chat template. None: the tokenizer's own."""

    hf_tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments for `AutoTokenizer.from_pretrained`."""

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


@dataclass(frozen=True)
class DatasetBuildContext:
    """What a dataset may need to know about the run."""

    train_samples: int
    """Training samples the run will draw."""

    valid_samples: int
    """Validation samples the run will draw."""

    test_samples: int
    """Test samples the run will draw."""

    tokenizer: Any = None
    """The run's tokenizer, as made by `build_tokenizer`."""


@dataclass(kw_only=True)
class DatasetProvider(DataloaderConfig, ABC):
    """Base of a user's own dataset configuration.

    `build_datasets` returns (train, valid, test) map-style datasets, None for one that is not wanted. An item is a
    dict of 1-D tensors of one length, at most the model's `seq_length`: `tokens` and `labels` (int64; labels already
    shifted), `loss_mask` (float32) and, if positions are not 0, 1, 2, ..., `position_ids` (int64). A dataset with an
    attribute `lengths` (one item length each) is padded to the longest sample of a batch, another to
    `seq_length`. Every rank builds the same datasets.
    """

    seed: int = 1234
    """Seed of the training order, if `dataloader_type` shuffles."""

    @abstractmethod
    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any | None, Any | None, Any | None]:
        """Returns the training, validation and test datasets; None for one that is not wanted."""


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")


def check_known_keys(found: Iterable[str], known: list[str], *, where: str) -> None:
    """Raises ValueError naming the first key of `found` that is not in `known`, with the nearest valid name."""
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has an unknown key {key!r}: did you mean {near!r}? (valid: {', '.join(known)})")
