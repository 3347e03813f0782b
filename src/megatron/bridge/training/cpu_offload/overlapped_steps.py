# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run does for steps that return before their weights are there: wait where they are read, and check them.

Weights are late where the host's step overlaps with the next forward pass, and where data-parallel ranks gather them
in it (`ddp.overlap_param_gather`). Until then a rank has the new weights of its own part alone.
"""

from typing import Any

from megatron.bridge.offload_engine.overlap.arrivals import gather_late_weights, gathers_late
from megatron.bridge.offload_engine.overlap.connect import raise_failures, wait_for_overlapped_step
from megatron.bridge.training.cpu_offload.param_copies import check_hybrid_optimizer_param_copies
from megatron.bridge.utils.distributed import raise_on_all_ranks

NUM_CHECKED_STEPS = 2


def steps_overlap(cfg: Any) -> bool:
    """Whether a run's steps return early. Without an optimizer's section they don't."""
    return getattr(getattr(cfg, "optimizer", None), "overlap_cpu_optimizer_step", False)


def weights_are_late(cfg: Any, model: list[Any]) -> bool:
    """Whether a step can end before this rank has all its weights. The same on all ranks."""
    return steps_overlap(cfg) or any(map(gathers_late, model))


def wait_for_weights(cfg: Any, model: list[Any], optimizer: Any) -> None:
    """Wait for the last step's weights, if they are late. Then collective.

    Args:
        cfg: The run's configuration.
        model: This rank's chunks, wrapped in DDP or not.
        optimizer: From `setup_optimizer`, or None.

    Raises:
        Exception: The step on the host failed, here or on another rank. Raised on all ranks.
    """
    if optimizer is not None and steps_overlap(cfg):
        wait_for_overlapped_step(optimizer)
    gather_late_weights(model)


def check_overlapped_step(cfg: Any, optimizer: Any, *, num_taken: int) -> None:
    """If steps overlap, raise if the last one failed or, of the first ones, left a weight behind. Then collective.

    Call it once the forward pass after the step has run, so that it waits for nothing.

    Args:
        cfg: The run's configuration.
        optimizer: From `setup_optimizer`.
        num_taken: Steps that this process has taken.

    Raises:
        Exception: The step on the host failed. Raised on all ranks.
        RuntimeError: A weight is not its rounded master, here or on another rank.
    """
    if not steps_overlap(cfg):
        return
    raise_failures(optimizer)
    if 0 < num_taken <= NUM_CHECKED_STEPS:
        with raise_on_all_ranks("checking the weights of an overlapped step"):
            _check_weights(optimizer)


def _check_weights(optimizer: Any) -> None:
    try:
        check_hybrid_optimizer_param_copies(optimizer, exact=False)
    except RuntimeError as error:
        found = str(error).partition(";")[0].replace("the loaded weight", "the weight")
        raise RuntimeError(
            f"an overlapped step left a weight behind: {found}; set optimizer.overlap_cpu_optimizer_step=false"
        ) from error
