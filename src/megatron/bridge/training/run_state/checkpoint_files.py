# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What scripts ask of a checkpoint's files under the names of `training.checkpointing`, and what it refuses by name."""

import os
from enum import Enum, auto
from pathlib import Path
from typing import Any, NoReturn

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.run_state.content import CHECKPOINT_VERSION
from megatron.bridge.utils.distributed import barrier, is_rank_0, raise_on_all_ranks

StrPath = str | os.PathLike[str]


class CheckpointType(Enum):
    """Where a checkpoint is."""

    LOCAL = auto()
    """On each machine's own disk."""

    GLOBAL = auto()
    """In one directory that all ranks write."""

    FSDP_DTENSOR = auto()
    """Of Megatron's FSDP; never made or read here."""


def find_checkpoint_rank_0(checkpoints_path: StrPath, iteration: int, release: bool = False) -> str | None:
    """The directory of an iteration that is complete; None if there is no such one. Any rank may ask."""
    directory = iterations.checkpoint_name(checkpoints_path, iteration, release=release)
    return str(directory) if iterations.is_complete(directory) else None


def read_metadata(tracker_filename: StrPath) -> tuple[int, bool]:
    """The iteration that a tracker file names, and whether it names `release`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds neither, or isn't called as a tracker is.
    """
    path = Path(tracker_filename)
    if path.name != iterations.TRACKER_FILE:
        raise ValueError(f"{path} is no tracker: expected a file named {iterations.TRACKER_FILE}")
    tracker = iterations.read_tracker(path.parent)
    if tracker is None:
        raise FileNotFoundError(f"{path} is missing: name the tracker of a directory that a save wrote")
    return tracker.iteration, tracker.release


def get_checkpoint_version() -> float:
    """The version of the content that saves write and loads expect."""
    return CHECKPOINT_VERSION


def set_checkpoint_version(value: float) -> None:
    """Accept the version that there is.

    Raises:
        ValueError: Another one.
    """
    if value != CHECKPOINT_VERSION:
        raise ValueError(f"checkpoint version {value} is not supported: expected {CHECKPOINT_VERSION}")


def cleanup_old_non_persistent_checkpoint(save_dir: StrPath, leave_ckpt_num: int = 1, do_async: bool = False) -> None:
    """Remove all but the newest complete iterations of a directory. Call on all ranks; rank 0 removes.

    Args:
        save_dir: A directory of iterations.
        leave_ckpt_num: How many stay.
        do_async: Accepted: they are gone when this returns.
    """
    with raise_on_all_ranks(f"removing old checkpoints in {save_dir}"):
        if is_rank_0() and Path(save_dir).is_dir():
            iterations.prune(save_dir, leave_ckpt_num)
    barrier()


def delete_extra_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Remove the `_extra_state` entries of a model's state, or of its chunks in a whole state; returns it."""
    chunks = [part for key, part in state_dict.items() if key.startswith("model") and isinstance(part, dict)]
    for weights in chunks or [state_dict]:
        for key in [key for key in weights if "_extra_state" in str(key)]:
            del weights[key]
    return state_dict


def save_tokenizer_assets(tokenizer: Any, tokenizer_config: Any, checkpoint_path: StrPath) -> None:
    """Write a tokenizer's files into an iteration's directory (rank 0).

    Args:
        tokenizer: From `build_tokenizer`.
        tokenizer_config: Accepted: the tokenizer knows its files.
        checkpoint_path: The iteration's directory.
    """
    if is_rank_0() and tokenizer is not None:
        tokenizer.save_pretrained(Path(checkpoint_path) / iterations.TOKENIZER_DIRECTORY)


def maybe_save_dataloader_state(
    model: Any, train_iterator: Any, iteration: int, dataloader_save_path: str | None, **process_groups: Any
) -> None:
    """Nothing to do without a path: which samples a step takes follows from the samples consumed.

    Raises:
        ValueError: A path, which is Energon's.
    """
    _refuse_dataloader_state("dataloader_save_path", dataloader_save_path)


def maybe_load_dataloader_state(
    train_iterator: Any, iteration: int, dataloader_load_path: str | None, **process_groups: Any
) -> None:
    """Nothing to do without a path: which samples a step takes follows from the samples consumed.

    Raises:
        ValueError: A path, which is Energon's.
    """
    _refuse_dataloader_state("dataloader_load_path", dataloader_load_path)


def _refuse_dataloader_state(name: str, path: str | None) -> None:
    if path is not None:
        raise ValueError(
            f"{name}={path!r}: the state of an Energon loader is not supported; leave it out, a resume finds its "
            "samples by the number consumed"
        )


def schedule_async_save(global_state: Any, async_request: Any) -> NoReturn:
    """Refused: a save with `checkpoint.async_save` starts by itself."""
    raise NotImplementedError(
        "schedule_async_save: requests of Core's are not taken; set checkpoint.async_save=true and call save_checkpoint"
    )


def _refuse_fsdp(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: FSDP is not supported; take the distributed optimizer and ckpt_format torch_dist"
    )


def preprocess_fsdp_dtensor_state_dict(*args: Any, **options: Any) -> NoReturn:
    """Refused: there is no FSDP here."""
    _refuse_fsdp("preprocess_fsdp_dtensor_state_dict")


def save_fsdp_dtensor_checkpoint(*args: Any, **options: Any) -> NoReturn:
    """Refused: there is no FSDP here."""
    _refuse_fsdp("save_fsdp_dtensor_checkpoint")


def load_fsdp_dtensor_checkpoint(*args: Any, **options: Any) -> NoReturn:
    """Refused: there is no FSDP here."""
    _refuse_fsdp("load_fsdp_dtensor_checkpoint")
