# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Write an iteration, now or in the background, and remove what a run has abandoned."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron.core import mpu

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.close_save import close_save
from megatron.bridge.checkpoint.model_checkpoint import prepare_save
from megatron.bridge.checkpoint.sharded_save import plan_save
from megatron.bridge.models.conversion.generation_config import write_generation_config
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer
from megatron.bridge.training.run_state.background import BackgroundSave
from megatron.bridge.training.run_state.content import sharding_metadata
from megatron.bridge.training.run_state.local import remove_local_from_step
from megatron.bridge.utils.distributed import barrier, is_rank_0, raise_on_all_ranks


class SavedRun(Protocol):
    """What a save asks of a run: a `GlobalState` has it."""

    cfg: Any
    """The run's `ConfigContainer`."""
    train_state: Any
    """The run's `TrainState`."""
    tokenizer: Any
    """The tokenizer, written beside the weights. None: there is none."""
    generation_config: Any
    """Content of the model's `generation_config.json`. None: there is none."""
    background_save: Any
    """The save that is being written, a `BackgroundSave`. None: there is none."""


def save_iteration(
    state: SavedRun,
    content: dict[str, Any],
    root: str | None,
    *,
    option: str,
    keep: int,
    afterwards: Callable[[], None] = lambda: None,
) -> Path:
    """Write an iteration, commit it, and remove all but the newest `keep` iterations (0 or less: keep all).

    Raises:
        ValueError: `root`, which `option` names, is not set or can't be written.
    """
    cfg, step = state.cfg, state.train_state.step
    if root is None:
        raise ValueError(f"save_checkpoint needs {option}: set it to a directory")
    started = time.monotonic()
    unfinished = prepare_save(root, step, option=option)
    save = plan_save(
        content,
        unfinished,
        content_metadata=sharding_metadata(cfg),
        parallel_group=mpu.get_data_parallel_group(with_context_parallel=True)
        if cfg.checkpoint.fully_parallel_save
        else None,
    )
    with raise_on_all_ranks(f"saving the tokenizer in {unfinished}"):
        if is_rank_0() and cfg.checkpoint.save_tokenizer_assets and state.tokenizer is not None:
            state.tokenizer.save_pretrained(unfinished / iterations.TOKENIZER_DIRECTORY)
            if state.generation_config is not None:
                write_generation_config(unfinished / iterations.TOKENIZER_DIRECTORY, state.generation_config)
    close = partial(
        close_save,
        unfinished,
        step,
        keep=keep,
        retain_interval=cfg.checkpoint.save_retain_interval,
        run_config=cfg.to_dict(),
        train_state=state.train_state.state_dict(),
        started=started,
        afterwards=afterwards,
    )
    if cfg.checkpoint.async_save:
        state.background_save = BackgroundSave(save, close)
        return iterations.checkpoint_name(root, step)
    save.write(show_progress=True)
    save.complete()
    return close()


def finish_background_save(state: SavedRun, *, wait: bool) -> Path | None:
    """Complete the run's save in the background, if there is one and all ranks have written. Call on all ranks.

    Args:
        state: The run.
        wait: Wait until all ranks have written.

    Returns:
        The directory of the iteration that is now complete, or None.

    Raises:
        OSError: This rank couldn't write. The other ranks raise a RuntimeError with the same text.
    """
    save = state.background_save
    if save is None:
        return None
    state.background_save = None
    directory = save.finish(wait=wait)
    if directory is None:
        state.background_save = save
    return directory


def maybe_finalize_async_save(
    global_state: SavedRun,
    ckpt_cfg: CheckpointConfig | None = None,
    blocking: bool = False,
    terminate: bool = False,
) -> None:
    """Megatron Bridge's public name for `finish_background_save`. Call on all ranks.

    Args:
        global_state: The run.
        ckpt_cfg: Accepted: the run knows whether a save is being written.
        blocking: Wait until all ranks have written.
        terminate: The run ends: wait too.
    """
    finish_background_save(global_state, wait=blocking or terminate)


def is_empty_async_queue(global_state: SavedRun) -> bool:
    """Whether no save is being written in the background."""
    return global_state.background_save is None


def remove_abandoned(cfg: ConfigContainer, context: dict[str, Any], step: int) -> None:
    """Remove the non-persistent checkpoints of `step` and later steps, which a run that went back has abandoned."""
    remove_local_from_step(context, step)
    if cfg.checkpoint.non_persistent_ckpt_type == "global":
        root = cfg.checkpoint.non_persistent_root(cfg.checkpoint.save)
        with raise_on_all_ranks("removing abandoned checkpoints"):
            if is_rank_0() and root is not None:
                iterations.remove_from_step(root, step)
    barrier()
