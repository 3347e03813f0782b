# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Dataset configurations from what a script is given: a short name, or data paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.data.config import DataloaderConfig, GPTSFTDatasetConfig, MockGPTDatasetConfig
from megatron.bridge.data.presets import DATASETS, preset_named

__all__ = ["DATASET_PRESETS", "build_dataset_config", "dataset_train_mode", "get_blend_fields_from_data_paths"]

DATASET_PRESETS = (*DATASETS, "mock")
"""The short names: datasets of the hub for finetuning, and Core's mock data for training from random weights."""

Blend = tuple[list[str], list[float] | None]
DEFAULT_SPLIT = "9999,8,2"


def build_dataset_config(preset: str, seq_length: int, **fields: Any) -> DataloaderConfig:
    """The configuration of a dataset with a short name.

    Args:
        preset: One of `DATASET_PRESETS`, or the name of its repository on the hub.
        seq_length: Longest sample in tokens.
        fields: Further fields of the configuration.

    Raises:
        ValueError: Another name.
    """
    if dataset_train_mode(preset) == "pretrain":
        return MockGPTDatasetConfig(seq_length, **fields)
    return GPTSFTDatasetConfig(seq_length, **{"hf_dataset": preset, "do_test": False, **fields})


def dataset_train_mode(preset: str) -> str:
    """What a dataset with a short name is for: "pretrain" or "finetune"; ValueError for another name."""
    if preset == "mock":
        return "pretrain"
    if preset_named(preset) is None:
        raise ValueError(f"dataset preset {preset!r}: expected one of {', '.join(DATASET_PRESETS)}")
    return "finetune"


def get_blend_fields_from_data_paths(
    data_paths: Sequence[str] | None = None,
    data_args_path: str | Path | None = None,
    train_data_path: Sequence[str] | None = None,
    valid_data_path: Sequence[str] | None = None,
    test_data_path: Sequence[str] | None = None,
    mock: bool = False,
) -> tuple[Blend | None, list[Blend | None] | None, str | None]:
    """The fields `blend`, `blend_per_split` and `split`.

    Args:
        data_paths: Path prefixes, cut by `split`; with weights as `["0.3", "a", "0.7", "b"]`.
        data_args_path: A text file that holds them, separated by blanks.
        train_data_path: Path prefixes of the training data alone, as the next two of theirs.
        valid_data_path: Of the validation data.
        test_data_path: Of the test data.
        mock: Core's mock data, whatever else is said.

    Returns:
        All three None: mock data.

    Raises:
        ValueError: Data to be cut and data for each split are both named, or weights and paths don't alternate.
    """
    per_split = [train_data_path, valid_data_path, test_data_path]
    if mock:
        return None, None, None
    if data_args_path is not None:
        if data_paths is not None:
            raise ValueError("data_paths and data_args_path are both set: set one of them")
        data_paths = Path(data_args_path).read_text(encoding="utf-8").split()
    if data_paths and any(per_split):
        raise ValueError("data_paths is cut into splits, and train_data_path and the like name them: set one kind")
    if data_paths:
        return blend_of(data_paths), None, DEFAULT_SPLIT
    if any(per_split):
        return None, [blend_of(paths) if paths else None for paths in per_split], None
    return None, None, None


def blend_of(paths: str | Sequence[str]) -> Blend:
    """Path prefixes and their weights, None where there are none; a text is cut at its blanks.

    Raises:
        ValueError: Weights and paths don't alternate.
    """
    paths = paths.split() if isinstance(paths, str) else paths
    weights = [_as_weight(text) for text in paths[::2]]
    if weights[0] is None:
        if any(_as_weight(text) is not None for text in paths):
            raise ValueError(f"{' '.join(paths)}: expected a weight before each path, or none at all")
        return list(paths), None
    prefixes = list(paths[1::2])
    if len(paths) % 2 or None in weights:
        raise ValueError(f"{' '.join(paths)}: expected a weight before each path, or none at all")
    return prefixes, [weight for weight in weights if weight is not None]


def _as_weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
