# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of file names in a checkpoint directory; `megatron.bridge.checkpoint.iterations` defines them.

Paths are returned as strings, as scripts expect.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.iterations import CONFIG_FILE, TRACKER_PREFIX, TRAIN_STATE_FILE, checkpoint_exists
from megatron.bridge.checkpoint.iterations import is_hf_directory as is_hf_checkpoint_dir
from megatron.bridge.checkpoint.iterations import is_iteration_directory as is_checkpoint_iteration_directory
from megatron.bridge.training.state import TrainState
from megatron.bridge.utils.yaml_io import ConfigFileError, load_yaml

__all__ = [
    "CONFIG_FILE",
    "TRACKER_PREFIX",
    "TRAIN_STATE_FILE",
    "checkpoint_exists",
    "ensure_directory_exists",
    "file_exists",
    "get_checkpoint_name",
    "get_checkpoint_run_config_filename",
    "get_checkpoint_tracker_filename",
    "get_checkpoint_train_state_filename",
    "get_hf_model_id_from_checkpoint",
    "is_checkpoint_iteration_directory",
    "is_hf_checkpoint_dir",
    "join_paths",
    "read_run_config",
    "read_train_state",
]

Reader = TypeVar("Reader", bound=Callable[..., Any])
StrPath: TypeAlias = str | os.PathLike[str]


def _reads_each_time(reader: Reader) -> Reader:
    """Add the `cache_clear` that scripts call. There is no cache, so that no two callers share an object."""
    reader.cache_clear = lambda: None  # type: ignore[attr-defined]  # a function takes attributes
    return reader


def file_exists(path: StrPath) -> bool:
    """Whether `path` is an existing file or directory."""
    return os.path.exists(path)


def join_paths(*paths: StrPath) -> str:
    """The parts of a path as one text."""
    return os.path.join(*[os.fspath(path) for path in paths])


def ensure_directory_exists(filename: StrPath, check_parent: bool = True) -> None:
    """Create the parent directory of `filename`, or, with `check_parent=False`, the directory `filename` itself."""
    path = Path(filename)
    (path.parent if check_parent else path).mkdir(parents=True, exist_ok=True)


def get_checkpoint_name(checkpoints_path: StrPath, iteration: int, release: bool = False) -> str:
    """The directory of one iteration: `<root>/iter_0000010`, or `<root>/release`."""
    return str(iterations.checkpoint_name(checkpoints_path, iteration, release=release))


def get_checkpoint_train_state_filename(checkpoints_path: StrPath, prefix: str | None = None) -> str:
    """The train state in an iteration's directory, or, with prefix `latest`, the copy of the newest one in the root."""
    return str(Path(checkpoints_path) / (TRAIN_STATE_FILE if prefix is None else f"{prefix}_{TRAIN_STATE_FILE}"))


def get_checkpoint_run_config_filename(checkpoints_path: StrPath) -> str:
    """The run's configuration in an iteration's directory."""
    return str(Path(checkpoints_path) / CONFIG_FILE)


def get_checkpoint_tracker_filename(checkpoints_path: StrPath) -> str:
    """The file in the root that says which iteration is the latest complete one."""
    return str(Path(checkpoints_path) / iterations.TRACKER_FILE)


def get_hf_model_id_from_checkpoint(path: StrPath) -> str | None:
    """The Hugging Face directory or hub name that a checkpoint's model came from; None if the checkpoint has none.

    Args:
        path: Root, `iter_N` or `release` directory.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: It is not complete.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    return AutoBridge.get_hf_model_id_from_checkpoint(os.fspath(path))


@_reads_each_time
def read_run_config(run_config_filename: StrPath) -> dict[str, Any]:
    """Read a `run_config.yaml` as plain data, a new object each time. No class that it names is imported.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It isn't YAML, or not a mapping.
    """
    content = load_yaml(os.fspath(run_config_filename))
    if not isinstance(content, dict):
        raise ConfigFileError(
            f"{run_config_filename} holds a {type(content).__name__}: expected a mapping of sections; "
            "name the run_config.yaml that a save wrote"
        )
    return content


@_reads_each_time
def read_train_state(train_state_filename: StrPath) -> TrainState:
    """Read a `train_state.pt` into a new object, which the caller may change.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or a field is missing.
    """
    from megatron.bridge.checkpoint.safe_pickle import read_blob

    train_state = TrainState()
    train_state.load_state_dict(read_blob(os.fspath(train_state_filename)))
    return train_state
