# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Model weights in a checkpoint: live chunks <-> sharded state, and whole weights-only checkpoints.

A model is a list of chunks, one per virtual pipeline stage of this rank; each may be wrapped (DDP, Float16Module).
One chunk is stored under `model`, several under `model0`, `model1`, … as in Megatron-LM; the tensors' own keys carry
no such prefix.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.manifest import write_manifest
from megatron.bridge.checkpoint.partial_stacks import split_partial_stacks
from megatron.bridge.checkpoint.sharded_save import save_sharded
from megatron.bridge.checkpoint.sharded_state import load_sharded
from megatron.bridge.utils.distributed import barrier, is_rank_0, raise_on_all_ranks
from megatron.bridge.utils.files import atomic_write, check_writable_directory, fsync_directory, move_directory
from megatron.bridge.utils.yaml_io import parse_yaml

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's dumper if PyYAML was built with it: ten times as fast."""


_SECTIONS_READ = ("model", "checkpoint", "optimizer", "ddp", "rng", "peft")
"""The sections of another run's configuration that a load may use."""


def chunk_keys(num_chunks: int) -> list[str]:
    """The state-dict key of each chunk: `model`, or `model0`, `model1`, … where there are several."""
    return ["model"] if num_chunks == 1 else [f"model{index}" for index in range(num_chunks)]


def model_sharded_state_dict(
    model: Sequence[MegatronModule], metadata: dict[str, Any] | None = None
) -> ShardedStateDict:
    """The sharded state of a model's chunks, by chunk key; a template to load into and a description to save.

    Args:
        model: This rank's chunks.
        metadata: Passed to Core's `sharded_state_dict`.
    """
    chunks = [unwrap_model(chunk) for chunk in model]
    return {
        key: chunk.sharded_state_dict(metadata=metadata)
        for key, chunk in zip(chunk_keys(len(chunks)), chunks, strict=True)
    }


def wanted_weights(state_dict: dict[str, Any], is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    """A part of a model's sharded state. Stacked tensors of which only some elements are kept are split. Collective.

    Args:
        state_dict: From `model_sharded_state_dict`.
        is_wanted: Which of a chunk's names to keep.
    """
    return split_partial_stacks(
        {
            chunk: {name: value for name, value in state.items() if is_wanted(name)}
            for chunk, state in state_dict.items()
        }
    )


def read_in_fp32(sharded_state_dict: Any) -> None:
    """Give a template new FP32 tensors to load into. A 16-bit template would round the stored values.

    Args:
        sharded_state_dict: From `model_sharded_state_dict`; changed in place. The model's tensors are not changed.
    """
    if isinstance(sharded_state_dict, dict):
        for value in sharded_state_dict.values():
            read_in_fp32(value)
    elif isinstance(sharded_state_dict, (ShardedTensor, ShardedTensorFactory)):
        if sharded_state_dict.data is not None and sharded_state_dict.data.dtype in (torch.bfloat16, torch.float16):
            sharded_state_dict.data = sharded_state_dict.data.detach().float()
            if isinstance(sharded_state_dict, ShardedTensor):
                sharded_state_dict.dtype = torch.float32


def load_model_state_dict(
    model: Sequence[MegatronModule],
    state_dict: dict[str, Any],
    *,
    strict: bool = True,
    is_wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Put loaded tensors into a model's chunks.

    Args:
        model: This rank's chunks.
        state_dict: From `load_sharded`, by chunk key.
        strict: The keys must be exactly those of the model, except that Transformer Engine's `_extra_state` may be
            missing.
        is_wanted: Which of the model's keys must be there.

    Raises:
        ValueError: Names the first key that differs.
    """
    for key, chunk in zip(chunk_keys(len(model)), model, strict=True):
        # Core drops a chunk from which nothing is wanted, such as a stage without adapters.
        missing, unexpected = unwrap_model(chunk).load_state_dict(state_dict.get(key, {}), strict=False)
        missing = [name for name in missing if is_wanted(name) and not name.endswith("_extra_state")]
        unexpected = [name for name in unexpected if not name.endswith("_extra_state")]
        if strict and (missing or unexpected):
            differing = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not in the model"
            raise ValueError(
                f"the checkpoint's {key} doesn't fit: {differing} "
                f"({len(missing)} missing, {len(unexpected)} unexpected in all); load a checkpoint of this model"
            )


def save_model_checkpoint(
    model: Sequence[MegatronModule],
    path: str | Path,
    *,
    run_config: dict[str, Any],
    train_state: dict[str, torch.Tensor] | None = None,
    iteration: int = 0,
    write_beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write a weights-only checkpoint with all ranks, in the layout that `layout` describes.

    Args:
        model: This rank's chunks.
        path: Root directory; the iteration's directory is made in it.
        run_config: Plain data for `run_config.yaml`; `run_config["model"]` describes the model.
        train_state: Tensors for `train_state.pt`; None writes none.
        iteration: The iteration to save as.
        write_beside: Called on rank 0 to write other files into the iteration's directory.

    Returns:
        The iteration's directory.

    Raises:
        ValueError: `path` can't be written.
    """
    unfinished = prepare_save(Path(path).expanduser(), iteration, option="the checkpoint's directory")
    save_sharded(model_sharded_state_dict(model), unfinished)
    with raise_on_all_ranks(f"writing what stands beside the tensors in {unfinished}"):
        if write_beside is not None and is_rank_0():
            write_beside(unfinished)
    return commit_checkpoint(unfinished, iteration, run_config=run_config, train_state=train_state)


def prepare_save(root: str | Path, iteration: int, *, option: str) -> Path:
    """Create the directory for a save, and clean up what killed saves left behind. Call on all ranks.

    Args:
        root: Parent of the iteration's directory.
        iteration: The iteration to save as.
        option: What named the root, for the error.

    Returns:
        An empty directory, which `commit_checkpoint` renames to the iteration's.

    Raises:
        ValueError: `root` can't be written.
    """
    unfinished = iterations.unfinished_name(root, iteration)
    with raise_on_all_ranks(f"preparing {root}"):
        if is_rank_0():
            check_writable_directory(root, option)
            iterations.clear_leftovers(root)
            _make_empty(unfinished)
    return unfinished


def _make_empty(unfinished: Path) -> None:
    """Create a directory. Raises ValueError if a partial save is there that can't be removed."""
    try:
        unfinished.mkdir()
    except FileExistsError as error:
        raise ValueError(
            f"{unfinished} stands in the way of this save and can't be removed: it is what a save that was killed left "
            "behind; remove it by hand and start again"
        ) from error


def commit_checkpoint(
    unfinished: Path, iteration: int, *, run_config: dict[str, Any], train_state: dict[str, torch.Tensor] | None
) -> Path:
    """Complete a save: write all files besides the tensors, rename the directory, move the tracker.

    Moving the tracker is the commit. Until then the previous checkpoint is the latest. Call on all ranks after the
    tensors are complete; rank 0 writes.

    Returns:
        The iteration's directory.
    """
    root = unfinished.parent
    directory = iterations.checkpoint_name(root, iteration)
    with raise_on_all_ranks(f"completing {directory}"):
        if is_rank_0():
            with atomic_write(unfinished / iterations.CONFIG_FILE) as file:
                yaml.dump(run_config, file, Dumper=_SafeDumper, sort_keys=False)
            if train_state is not None:
                _write_train_state(unfinished / iterations.TRAIN_STATE_FILE, train_state)
            write_manifest(unfinished)
            fsync_directory(unfinished)
            move_directory(unfinished, directory)
            if train_state is not None:
                _write_train_state(root / f"{iterations.TRACKER_PREFIX}_{iterations.TRAIN_STATE_FILE}", train_state)
            iterations.write_tracker(root, iteration)
    barrier()
    return directory


def _write_train_state(path: Path, train_state: dict[str, torch.Tensor]) -> None:
    with atomic_write(path, "wb") as file:
        torch.save(train_state, file)


def load_model_weights(
    model: Sequence[MegatronModule],
    path: str | Path,
    *,
    ckpt_step: int | None = None,
    strict: str = "assume_ok_unexpected",
    is_wanted: Callable[[str], bool] = lambda name: True,
    verify: bool = True,
) -> Path:
    """Load the weights of a checkpoint into a model, at any layout.

    Args:
        model: This rank's chunks.
        path: Root, `iter_N` or `release` directory.
        ckpt_step: This iteration instead of the latest.
        strict: Core's `StrictHandling` name for keys on one side only.
        is_wanted: Which of the model's weights to load, by their names in a chunk.
        verify: See `load_sharded`.

    Returns:
        The directory that was read.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: Not complete, or for another model.
    """
    with raise_on_all_ranks(f"finding a checkpoint in {path}"):
        directory = iterations.resolve_checkpoint(path, ckpt_step)
    template = wanted_weights(model_sharded_state_dict(model), is_wanted)
    load_model_state_dict(model, load_sharded(template, directory, strict=strict, verify=verify), is_wanted=is_wanted)
    return directory


def read_run_config(directory: str | Path) -> dict[str, Any]:
    """Read an iteration's `run_config.yaml` as plain data. `_target_` entries stay names: nothing is imported.

    Raises:
        FileNotFoundError: The directory has none.
        ValueError: It isn't YAML, or not a mapping of sections.
    """
    path = Path(directory) / iterations.CONFIG_FILE
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), _SafeLoader)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: expected the configuration of the run that saved it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = json.dumps(str(error).replace("\n", " "))
        raise ValueError(f"{path} can't be read: expected plain YAML, found {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a mapping of sections")
    for name in _SECTIONS_READ:
        if not isinstance(content.get(name), dict | None):
            raise ValueError(f"{path}: {name} is a {type(content[name]).__name__}: expected a mapping of options")
    return content
