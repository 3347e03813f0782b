# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Several finetuning data sets as one, with weights, and several validation sets beside each other.

In a blend with weights, draw k of set i has the time (2k + 1) / w_i, and the draws come in order of their times
(Sainte-Laguë's rule). So any number of samples is shared out as the weights say, to within rounding, and which sample
has which position depends on nothing that came before.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from megatron.bridge.data.config import DatasetBuildContext, GPTSFTDatasetConfig
from megatron.bridge.data.finding import SPLITS
from megatron.bridge.data.presets import preset_named
from megatron.bridge.data.sampler import epoch_order, sample_indices
from megatron.bridge.data.sft_datasets import build_sft_datasets
from megatron.bridge.data.validation_sets import names_of_sets
from megatron.bridge.utils.distributed import raise_on_all_ranks

logger = logging.getLogger(__name__)

HF_NAMES = {"training": "train", "validation": "validation", "test": "test"}
_FILES_OF_A_SAVED_DATASET = ("dataset_dict.json", "state.json")


def draws(start: int, count: int, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which set each position of a blend draws from, and how often the set was drawn from before.

    Args:
        start: The first position.
        count: Number of positions.
        weights: One for each set, above 0.

    Returns:
        Two arrays, int64 [count].
    """
    # Position n lies at a time at which set i has been drawn from n * share times, give or take less than the margin.
    total, margin = sum(weights), len(weights) + 2
    first = [max(0, int(start * weight / total) - margin) for weight in weights]
    ends = [int((start + count) * weight / total) + margin for weight in weights]
    numbers = [np.arange(low, high, dtype=np.int64) for low, high in zip(first, ends, strict=True)]
    times = np.concatenate([(2 * one + 1) / weight for one, weight in zip(numbers, weights, strict=True)])
    sets = np.repeat(np.arange(len(weights)), [len(one) for one in numbers])
    order = np.lexsort((sets, times))[start - sum(first) :][:count]
    return sets[order], np.concatenate(numbers)[order]


class JoinedDataset(Dataset):
    """The samples of several sets, one set after the other.

    Attributes:
        members: The sets.
        lengths: Positions of each sample, int64 [number of samples].
        is_packed: Whether items have `cu_seqlens`.
        weights: Of the sets in the training order. None: each sample comes once an epoch, wherever it is from.
    """

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        """Joins sets that have `lengths`, packed all or none."""
        self.members = list(members)
        self.weights = None if weights is None else list(weights)
        self.lengths = np.concatenate([np.asarray(member.lengths, dtype=np.int64) for member in self.members])
        self.is_packed = any(getattr(member, "is_packed", False) for member in self.members)
        self._ends = np.cumsum([len(member) for member in self.members])
        self._orders: dict[int, dict[int, np.ndarray]] = {}

    @property
    def report(self) -> str:
        """Figures of the sets."""
        weights = [""] * len(self.members) if self.weights is None else [f"{weight:g} of " for weight in self.weights]
        return "; ".join(
            f"{weight}{getattr(member, 'report', None) or f'{len(member)} samples'}"
            for weight, member in zip(weights, self.members, strict=True)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a sample of the set that it is in."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        member = int(np.searchsorted(self._ends, index, side="right"))
        item: dict[str, Any] = self.members[member][int(index - self._ends[member] + len(self.members[member]))]
        return item

    def training_order(self, start: int, count: int, *, seed: int, shuffle: bool) -> np.ndarray:
        """The samples at positions of the training order, int64 [count]; with weights, each set has its own epochs."""
        if self.weights is None:
            return sample_indices(start, count, num_samples=len(self), seed=seed, shuffle=shuffle)
        sets, numbers = draws(start, count, self.weights)
        rows = np.empty(count, dtype=np.int64)
        for member in np.unique(sets):
            chosen, size = sets == member, len(self.members[member])
            epochs, offsets = np.divmod(numbers[chosen], size)
            if shuffle:
                orders = {int(epoch): self._order(int(member), int(epoch), seed) for epoch in np.unique(epochs)}
                offsets = np.array([orders[int(one)][offset] for one, offset in zip(epochs, offsets, strict=True)])
            rows[chosen] = self._ends[member] - size + offsets
        return rows

    def _order(self, member: int, epoch: int, seed: int) -> np.ndarray:
        """One epoch of one set, kept until two later ones were asked for."""
        kept = self._orders.setdefault(member, {})
        if epoch not in kept:
            if len(kept) == 2:
                del kept[min(kept)]
            size = len(self.members[member])
            kept[epoch] = epoch_order.__wrapped__(size, seed=seed + member, epoch=epoch)
        return kept[epoch]


def build_blended_datasets(config: GPTSFTDatasetConfig, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
    """Builds the datasets of `blend` or `blend_per_split`; see `build_sft_datasets`.

    Returns:
        Training, validation and test; with `context.multiple_validation_sets`, validation is a dict of sets by name.
    """
    if config.hf_dataset is not None:
        name = "blend" if config.blend is not None else "blend_per_split"
        logger.info("dataset.hf_dataset isn't read: dataset.%s is set", name)
    if config.blend is not None:
        paths, weights = config.blend
        members = [build_sft_datasets(_member(config, path), context) for path in paths]
        by_split = {split: [one[index] for one in members] for index, split in enumerate(SPLITS)}
        paths_of = dict.fromkeys(SPLITS, paths)
    else:
        blends = dict(zip(SPLITS, config.blend_per_split or [], strict=True))
        wanted = {"training": True, "validation": config.do_validation, "test": config.do_test}
        paths_of = {split: blend[0] if blend and wanted[split] else [] for split, blend in blends.items()}
        with raise_on_all_ranks("finding the data"):
            found = {
                split: [_member_of_split(config, path, split) for path in paths] for split, paths in paths_of.items()
            }
        by_split = {split: [build_sft_datasets(member, context)[0] for member in found[split]] for split in SPLITS}
        weights = (blends["training"] or ([], None))[1]
    if context.multiple_validation_sets:
        pairs = zip(names_of_sets(context, paths_of["validation"]), by_split["validation"], strict=True)
        valid: Any = {name: dataset for name, dataset in pairs if dataset is not None}
    else:
        valid = _joined(by_split["validation"])
    return _joined(by_split["training"], weights), valid or None, _joined(by_split["test"])


def _joined(members: Sequence[Any], weights: Sequence[float] | None = None) -> JoinedDataset | None:
    """The sets that are there, as one; None where there is none."""
    present = [member for member in members if member is not None]
    return JoinedDataset(present, weights) if present else None


def _member(config: GPTSFTDatasetConfig, path: str, **changes: Any) -> GPTSFTDatasetConfig:
    """A blend's configuration with one of its paths as the place of the data."""
    is_saved = any((Path(path) / name).is_file() for name in _FILES_OF_A_SAVED_DATASET)
    is_of_the_hub = not Path(path).exists() and preset_named(path) is not None
    root, saved = (None, path) if is_saved or is_of_the_hub else (path, None)
    if config.path_to_cache:  # a folder for each: files of tokens are called as the file of rows, which are often alike
        changes |= {"path_to_cache": str(Path(config.path_to_cache) / path.strip("/").replace("/", "--"))}
    return replace(config, blend=None, blend_per_split=None, dataset_root=root, hf_dataset=saved, **changes)


def _member_of_split(config: GPTSFTDatasetConfig, path: str, split: str) -> GPTSFTDatasetConfig:
    """The same where only one split is taken from the path, which may be its file."""
    candidates = (path, f"{path}/{split}.jsonl", f"{path}/{HF_NAMES[split]}")
    for place in (
        candidates[1:] if Path(path).is_dir() and not (Path(path) / "state.json").is_file() else candidates[:1]
    ):
        if Path(place).exists():
            return _member(config, place, do_validation=False, do_test=False)
    raise FileNotFoundError(
        f"dataset.blend_per_split names {path} for {split}: expected a JSONL file, or a directory with {split}.jsonl"
    )
