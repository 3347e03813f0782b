# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The last step of every save, in the foreground or background: commit it, then remove older checkpoints."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.model_checkpoint import commit_checkpoint
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks

logger = logging.getLogger(__name__)


def close_save(
    unfinished: Path,
    step: int,
    *,
    keep: int,
    retain_interval: int | None,
    run_config: dict[str, Any],
    train_state: dict[str, torch.Tensor],
    started: float,
    afterwards: Callable[[], None],
) -> Path:
    """Commit a checkpoint whose tensors are all on disk, remove older ones, and call `afterwards`. Collective.

    Args:
        unfinished: From `prepare_save`.
        step: The iteration that was saved.
        keep: How many of the newest iterations stay; 0 or less: all.
        retain_interval: Iterations that are multiples of it stay too.
        run_config: Plain data for `run_config.yaml`.
        train_state: Tensors for `train_state.pt`.
        started: `time.monotonic()` at the save's start, for the log.
        afterwards: Called on each rank at the end.

    Returns:
        The iteration's directory.
    """
    directory = commit_checkpoint(unfinished, step, run_config=run_config, train_state=train_state)
    with raise_on_all_ranks(f"removing what is older than {directory}"):
        if is_rank_0():
            seconds = time.monotonic() - started
            try:
                logger.info("saved step %d to %s (%.1f MB in %.1f s)", step, directory, _megabytes(directory), seconds)
                for old in iterations.prune(directory.parent, keep, retain_interval=retain_interval):
                    logger.info("removed %s (the newest %d are kept)", old, keep)
            except OSError as error:  # the checkpoint is complete, so nothing after it may end the run
                logger.warning("looking for older checkpoints in %s failed: %s", directory.parent, error)
    afterwards()
    return directory


def _megabytes(directory: Path) -> float:
    return sum(entry.stat().st_size for entry in directory.rglob("*") if entry.is_file()) / 1e6
