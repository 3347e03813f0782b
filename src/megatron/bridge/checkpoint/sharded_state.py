# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read sharded state: Megatron-Core's `dist_checkpointing` in the `torch_dist` format, errors that say where."""

import inspect
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron.bridge.checkpoint.layout import DCP_METADATA_FILE
from megatron.bridge.utils.distributed import on_all_ranks


def load_sharded(
    sharded_state_dict: ShardedStateDict,
    directory: str | Path,
    *,
    strict: str = "assume_ok_unexpected",
    parallel_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read the tensors that a sharded state dict describes, with all ranks.

    Args:
        sharded_state_dict: The template; its tensors are filled in place where the format allows.
        directory: A complete iteration's directory.
        strict: Core's `StrictHandling` name, for keys that are in one of the two and not the other.
        parallel_group: Read each replicated tensor once in this group and exchange.

    Returns:
        The template's structure with tensors in place of their descriptions, and the common state.

    Raises:
        ValueError: A file is missing or cut off, or a tensor is missing or has another shape; the message names it.
    """
    directory = str(directory)
    with on_all_ranks(f"matching the model with {directory}"):
        check_files(directory)
        _check_common_state_is_readable(Path(directory))
        check_shapes(sharded_state_dict, directory)
    strategy = dist_checkpointing.serialization.get_default_load_sharded_strategy(directory)
    if parallel_group is not None:
        strategy = FullyParallelLoadStrategyWrapper(strategy, parallel_group)
    return dist_checkpointing.load(sharded_state_dict, directory, strategy, strict=strict)


def stored_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """The global shape of each tensor that a checkpoint holds, by key."""
    return {key: tuple(tensor.global_shape) for key, tensor in _stored_tensors(str(directory)).items()}


def stored_content_metadata(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint says of its content (`save_sharded`'s `content_metadata`); empty where it says nothing.

    Raises:
        ValueError: A later Core wrote it than this one can read, or a file is missing or cut off.
    """
    _check_common_state_is_readable(Path(directory))
    check_files(directory)  # later versions keep it among the tensors
    return dist_checkpointing.serialization.load_content_metadata(str(directory)) or {}


def check_files(directory: str | Path) -> None:
    """Refuse a checkpoint of which a file is missing or cut off, before anything is read from the others.

    Raises:
        ValueError: Names the first such file.
    """
    directory = Path(directory)
    needed_bytes: dict[str, int] = {}
    for part in _dcp_metadata(directory).storage_data.values():
        needed_bytes[part.relative_path] = max(needed_bytes.get(part.relative_path, 0), part.offset + part.length)
    for name, needed in sorted(needed_bytes.items()):
        path = directory / name
        found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
        if not path.is_file() or path.stat().st_size < needed:
            raise ValueError(
                f"{path} {found}: expected {needed} bytes, as {directory / DCP_METADATA_FILE} says; "
                "restore it from another copy, or load another iteration (checkpoint.ckpt_step)"
            )


def _dcp_metadata(directory: Path) -> Metadata:
    """What is stored in which file.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return FileSystemReader(directory).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{directory / DCP_METADATA_FILE} is damaged ({reason}): expected torch's description of a distributed "
            "checkpoint; restore it from another copy, or load another iteration (checkpoint.ckpt_step)"
        ) from error


def check_shapes(sharded_state_dict: ShardedStateDict, directory: str | Path) -> None:
    """Refuse a checkpoint whose tensors are not the ones the template asks for, before anything is read.

    Raises:
        ValueError: Names the first tensor that differs, how many others do, and both shapes.
    """
    stored = _stored_tensors(str(directory))
    wrong = []
    for wanted in _sharded_tensors(sharded_state_dict):
        if wanted.allow_shape_mismatch:
            continue
        if wanted.key not in stored:
            wrong.append(f"{wanted.key} is missing there, the run needs shape {tuple(wanted.global_shape)}")
        elif tuple(stored[wanted.key].global_shape) != tuple(wanted.global_shape):
            found = tuple(stored[wanted.key].global_shape)
            wrong.append(f"{wanted.key} has shape {found} there, the run needs {tuple(wanted.global_shape)}")
    wrong = list(dict.fromkeys(wrong))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{directory} doesn't fit this model: {wrong[0]}{more}; "
            "load a checkpoint of this model, or set the model's sizes to the checkpoint's"
        )


def _check_common_state_is_readable(directory: Path) -> None:
    """Core up to 0.16 keeps the common state in a file of its own; later versions write it among the tensors.

    Raises:
        ValueError: The checkpoint was written by a later Core than this one can read, or the file is cut off.
    """
    if "common_strategy" not in inspect.signature(dist_checkpointing.load).parameters:
        return
    path = directory / "common.pt"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no common.pt: a later Megatron-Core wrote it than the installed {core_version} can read; "
            "install that version"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size} bytes): expected an archive that torch wrote; "
            "restore it from another copy, or load another iteration (checkpoint.ckpt_step)"
        )


def _stored_tensors(directory: str) -> dict[str, ShardedTensor]:
    _dcp_metadata(Path(directory))  # readable, or an error that names the file
    metadata = dist_checkpointing.load_tensors_metadata(directory)
    return {key: tensor for key, tensor in metadata.items() if isinstance(tensor, ShardedTensor)}


def _sharded_tensors(state: Any) -> list[ShardedTensor]:
    """Every `ShardedTensor` in a nested state, factories built."""
    if isinstance(state, ShardedTensor):
        return [state]
    if isinstance(state, ShardedTensorFactory):
        return _sharded_tensors(state.build())
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _sharded_tensors(value)]
    if isinstance(state, (list, tuple)):
        return [tensor for value in state for tensor in _sharded_tensors(value)]
    return []


def read_plain_blob(path: str | Path) -> Any:
    """Read a `.pt` file that holds plain data and tensors, executing nothing.

    Raises:
        ValueError: The file is damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises a different class for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as plain data: {reason}; restore the file from another copy") from error
