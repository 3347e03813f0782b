# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of what turns a script's data paths into the fields of a `GPTDatasetConfig`."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["get_blend_fields_from_data_paths"]

Blend = tuple[list[str], list[float] | None]
DEFAULT_SPLIT = "9999,8,2"


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


def blend_of(paths: Sequence[str]) -> Blend:
    """Path prefixes and their weights, None where there are none.

    Raises:
        ValueError: Weights and paths don't alternate.
    """
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
