# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Local checkpoints: each rank keeps its own state on its own machine's disk, for a restart on the same machines.

They hold the same state as persistent checkpoints, and the load plan takes the newer of the two. They can't be
resharded: a run resumes from them only at the layout that wrote them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as core_version
from megatron.core import mpu
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks, rank, world_size
from megatron.bridge.utils.files import check_writable_directory

logger = logging.getLogger(__name__)

CORE_RELEASE = core_version.partition("+")[0]
"""Core's version, without the commit that Core 0.19 appends: that of any repository the process was started in."""

CONTEXT_KEY = "local_checkpoint_manager"
"""Megatron Bridge's key for the local checkpoints in a checkpointing context."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """The newest local checkpoint that every rank has."""

    step: int
    path: Path
    """This rank's file."""

    run_config: dict[str, Any]
    """The configuration of the run that saved it, as plain data."""

    num_ranks: int
    """Ranks of that run."""

    core_version: str
    holds_optimizer: bool


def open_local_checkpoints(checkpoint: CheckpointConfig) -> dict[str, Any]:
    """The checkpointing context of a run with local checkpoints; empty for one without. Call on all ranks.

    Raises:
        ValueError: The directory can't be written on some rank.
    """
    if checkpoint.non_persistent_ckpt_type != "local":
        return {}
    from megatron.bridge.training.run_state.local_files import LocalCheckpointFiles

    assert checkpoint.non_persistent_local_ckpt_dir is not None  # finalize() refuses it
    directory = Path(checkpoint.non_persistent_local_ckpt_dir)
    with raise_on_all_ranks(f"preparing {directory}"):
        check_writable_directory(directory / str(rank()), "checkpoint.non_persistent_local_ckpt_dir")
    return {CONTEXT_KEY: LocalCheckpointFiles(str(directory))}


def find_local(context: dict[str, Any]) -> LocalCheckpoint | None:
    """Look for the newest local checkpoint that every rank has. Call on all ranks.

    Args:
        context: From `open_local_checkpoints`.

    Returns:
        None if there is none or local checkpoints are off.

    Raises:
        ValueError: A rank's file is damaged. Names the file.
    """
    files = context.get(CONTEXT_KEY)
    if files is None:
        return None
    step = files.find_latest()
    _log_what_is_incomplete(files, step)
    if step < 0:
        return None
    path = files.path_of(step)
    with raise_on_all_ranks(f"reading {path}"):
        stored = files.read(path, mmap=True)
        common = stored.common
        return LocalCheckpoint(
            step=step,
            path=path,
            run_config=common["run_config"],
            num_ranks=common["num_ranks"],
            core_version=common["core_version"],
            # All ranks must agree. One that trains nothing has param groups, but no tensors.
            holds_optimizer="optimizer" in stored.sharded_state_dict or "optimizer" in common,
        )


def _log_what_is_incomplete(files: Any, step: int) -> None:
    """Warn of a newer local checkpoint that is skipped because some ranks lack it."""
    there = files.steps_by_rank()
    newest = max((own for steps in there for own in steps), default=-1)
    if newest > step and is_rank_0():
        missing = [str(index) for index, steps in enumerate(there) if newest not in steps]
        logger.warning(
            "the local checkpoint of step %d in %s is passed over: rank(s) %s have no file of it",
            newest,
            files.root_local_ckpt_dir,
            ", ".join(missing),
        )


def save_local(
    context: dict[str, Any],
    content: ShardedStateDict,
    step: int,
    *,
    algorithm: str,
    run_config: dict[str, Any],
    train_state: dict[str, torch.Tensor],
) -> Path:
    """Write each rank's state to its file. The previous file is removed once all ranks have the new one.

    Args:
        context: From `open_local_checkpoints`.
        content: The state, as for a persistent checkpoint. Changed: tensors that another rank writes are removed.
        step: The step to save as.
        algorithm: `checkpoint.non_persistent_local_ckpt_algo`.
        run_config: The run's configuration as plain data.
        train_state: The train state as tensors.

    Returns:
        This rank's file.

    Raises:
        OSError: This rank can't write its file. The other ranks raise a RuntimeError with the same text.
    """
    from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

    files = context[CONTEXT_KEY]
    files.remove_from(step)
    described = {
        **content,
        "run_config": run_config,
        "train_state": train_state,
        "num_ranks": world_size(),
        "core_version": CORE_RELEASE,
    }
    state, files.distribution = MCoreTensorAwareStateDict.from_state_dict(
        described,
        algo=algorithm,
        parallelization_group=_sharing_group(),
        cached_metadata=files.distribution,
    )
    _skip_copies_on_the_host(state)
    files.save(state, step)
    path = files.path_of(step)
    logger.info("saved step %d to %s", step, path)
    return path


def remove_local_from_step(context: dict[str, Any], step: int) -> None:
    """Remove the local checkpoints of `step`, which is now saved elsewhere, and of later steps. Call on all ranks."""
    if CONTEXT_KEY in context:
        context[CONTEXT_KEY].remove_from(step)


def read_local(context: dict[str, Any], template: ShardedStateDict, *, path: Path) -> dict[str, Any]:
    """Read the state that a template describes from the local checkpoint of `find_local`. Call on all ranks.

    Args:
        context: From `open_local_checkpoints`.
        template: As for `load_sharded`; its tensors are not changed.
        path: This rank's file, for errors.

    Returns:
        The template's structure with new host tensors in place of their descriptions, and the common state.

    Raises:
        ValueError: A file is damaged, or lacks something that the template asks for.
    """
    context[CONTEXT_KEY].find_latest()  # the plan may have been made with another context
    with raise_on_all_ranks(f"reading {path}"):
        stored, _ = context[CONTEXT_KEY].load()
        _check_fits(template, stored.sharded_state_dict, path)
    algorithm = stored.common["run_config"]["checkpoint"]["non_persistent_local_ckpt_algo"]
    # Core derives which rank wrote a shared tensor from all saved tensors, so the template must name all of them.
    rest = {key: part for key, part in stored.sharded_state_dict.items() if key not in template}
    described = {**template, **dict_list_map_outplace(lambda part: part.without_data(), rest)}
    loaded = stored.to_state_dict(described, algo=algorithm, parallelization_group=_sharing_group())
    return {key: value for key, value in loaded.items() if key not in rest}


def read_local_train_state(context: dict[str, Any], path: Path) -> dict[str, Any]:
    """The train state in the local checkpoint of `find_local`, as tensors. Call on all ranks.

    Args:
        context: From `open_local_checkpoints`.
        path: This rank's file.

    Raises:
        ValueError: The file is damaged.
    """
    with raise_on_all_ranks(f"reading {path}"):
        return context[CONTEXT_KEY].read(path, mmap=True).common["train_state"]


def _sharing_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights; each writes a part of them."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


def _skip_copies_on_the_host(state: Any) -> None:
    """Keep nvidia-resiliency-ext from copying host tensors, which would double an offloaded optimizer's memory.

    It copies so that training can continue while it writes. Here training waits, so no copy is needed. Views are still
    copied, because torch writes the whole storage of a view.
    """
    for tensor in state._sharded_tensors:
        data = tensor.data
        if data.device.type == "cpu" and data.untyped_storage().nbytes() == data.numel() * data.element_size():
            tensor.orig_device = "cpu"


def _check_fits(template: ShardedStateDict, stored: ShardedStateDict, path: Path) -> None:
    """Refuse a file that lacks a part of the template, before ranks exchange tensors.

    Raises:
        ValueError: Names the first tensor that is missing or differs.
    """
    there = {_identity(part): part for part in nested_values(stored)}
    wanted, _, _ = load_preprocess(template)
    for part in nested_values(wanted):
        if not isinstance(part, (ShardedTensor, ShardedObject)):
            continue
        found = there.get(_identity(part))
        if found is None:
            raise ValueError(
                f"{path} has no {part.key} as this run's rank {rank()} needs it: local checkpoints fit the model and "
                "layout that wrote them; start as before, or remove checkpoint.non_persistent_local_ckpt_dir's files"
            )


def _identity(part: Any) -> tuple:
    """The key by which two parts are the same part of the same tensor."""
    if isinstance(part, ShardedTensor):
        return (part.key, tuple(part.global_shape), tuple(part.global_offset), tuple(part.local_shape))
    return (part.key, tuple(part.global_shape), tuple(part.global_offset))
