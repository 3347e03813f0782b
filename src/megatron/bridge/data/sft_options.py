# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How lines become samples, and samples packs: the options inside a `GPTSFTDatasetConfig`, and checks of values."""

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from megatron.bridge.utils.section import BridgeSection


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


PACKED_PATHS = ("packed_train_data_path", "packed_val_data_path", "packed_metadata_path")


@dataclass(kw_only=True)
class PackedSequenceSpecs(BridgeSection):
    """Packing several samples in one row; each attends to itself alone, and its positions start at 0."""

    _section = "dataset.offline_packing_specs"

    packed_sequence_size: int = -1
    """Positions of a row, at most `seq_length`; a longer sample is shortened to it. -1: see where it is set."""

    packed_train_data_path: str | None = None
    """Training rows that were packed beforehand: an .npy or parquet file, a directory of them, or a pattern such as
    `packs/train_*.npy`. None: packs are made from the tokenised samples when the run starts, which takes seconds."""

    packed_val_data_path: str | None = None
    """The same for validation."""

    packed_metadata_path: str | None = None
    """JSON file about these rows, which they are checked against. None: there is none."""

    pad_cu_seqlens: bool = False
    """Not supported: boundaries of one number in every batch, for CUDA graphs."""

    pad_seq_to_mult: int = 1
    """Each sample is padded to a multiple of this many positions; rows packed beforehand must be."""

    def __post_init__(self) -> None:
        """Paths are kept as texts, as a file of the configuration has them."""
        for name in PACKED_PATHS:
            if isinstance(path := getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(path))

    @property
    def are_read(self) -> bool:
        """Whether training or validation rows are read from files."""
        return self.packed_train_data_path is not None or self.packed_val_data_path is not None

    def check(self, where: str, *, seq_length: int) -> None:
        """Raises ValueError if a value cannot work; `where` names the option that holds the specs."""
        size = self.packed_sequence_size
        if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or 1 <= size <= seq_length):
            raise ValueError(
                f"{where}.packed_sequence_size={size!r}: expected 1 to dataset.seq_length={seq_length}, or -1"
            )
        for name in PACKED_PATHS:
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path):
                raise ValueError(f"{where}.{name}={path!r}: expected the path of a file, or null")
        if self.packed_metadata_path is not None and not self.are_read:
            raise ValueError(
                f"{where}.packed_metadata_path={self.packed_metadata_path!r} without packed_train_data_path or "
                "packed_val_data_path: it is about rows in files; set one of them, or unset it"
            )
        if self.pad_cu_seqlens:
            raise ValueError(f"{where}.pad_cu_seqlens=True is not supported: set it to false")
        check_positive(f"{where}.pad_seq_to_mult", self.pad_seq_to_mult)
        if self.pad_seq_to_mult > (size if size > 0 else seq_length):
            raise ValueError(
                f"{where}.pad_seq_to_mult={self.pad_seq_to_mult}: no sample fits into a row then; lower it"
            )


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")


def check_blend(option: str, blend: Any) -> None:
    """Raises ValueError unless `blend` is paths and, for each, a weight above 0, or None."""
    expected = (
        f"{option}={blend!r}: expected paths and weights, such as (['a', 'b'], [0.3, 0.7]), or null for the weights"
    )
    if not isinstance(blend, tuple | list) or len(blend) != 2:
        raise ValueError(expected)
    paths, weights = blend
    if not isinstance(paths, tuple | list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(expected)
    if weights is None:
        return
    if not isinstance(weights, tuple | list) or len(weights) != len(paths):
        raise ValueError(f"{expected}; there are {len(paths)} paths")
    for weight in weights:
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(
                f"{option} has the weight {weight!r}: expected a number above 0; leave out what isn't wanted"
            )


def check_blends_per_split(blends: Any) -> None:
    """Raises ValueError unless `blends` is three blends, or None for a split that isn't there."""
    if not isinstance(blends, tuple | list) or len(blends) != 3:
        raise ValueError(f"dataset.blend_per_split={blends!r}: expected three blends: training, validation and test")
    for place, blend in enumerate(blends):
        if blend is not None:
            check_blend(f"dataset.blend_per_split[{place}]", blend)


def check_known_keys(found: Iterable[str], known: list[str], *, where: str) -> None:
    """Raises ValueError naming the first key of `found` that is not in `known`, with the nearest valid name."""
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has an unknown key {key!r}: did you mean {near!r}? (valid: {', '.join(known)})")


def read_shares(split: Any) -> tuple[float, float, float]:
    """Returns the shares of training, validation and test in a text such as "90,10,0"; they add up to 1.

    Raises:
        ValueError: It isn't such a text.
    """
    try:
        shares = [float(part) for part in str(split).split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < float("inf") for share in shares) or shares[0] == 0:
        raise ValueError(
            f'dataset.split={split!r}: expected shares of training, validation and test, such as "90,10,0"'
        )
    training, validation, test = (share / sum(shares) for share in shares)
    return training, validation, test
