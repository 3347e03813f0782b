# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Compares the content of checkpoints, bit-exact, without a model to load it into."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron.bridge.checkpoint import iterations


def stored_content(root: str | Path, iteration: int) -> dict[tuple, Any]:
    """Every tensor and object that an iteration holds, by key and place in the whole tensor; nothing is executed."""
    directory = iterations.checkpoint_name(root, iteration)
    content = {}
    for index, part in FileSystemReader(directory).read_metadata().storage_data.items():
        stored = (directory / part.relative_path).read_bytes()[part.offset : part.offset + part.length]
        content[index.fqn, tuple(index.offset or ())] = torch.load(io.BytesIO(stored), weights_only=True)
    return content


def unequal(first: dict[tuple, Any], second: dict[tuple, Any]) -> set[str]:
    """The keys whose content isn't bit-exact; both have the same keys."""
    assert first.keys() == second.keys() and first
    return {key[0] for key in first if not _equal(first[key], second[key])}


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return type(first) is type(second) and first == second
