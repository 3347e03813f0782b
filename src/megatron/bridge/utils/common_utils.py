# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of ranks, printing from one of them, and small things that scripts do around a model."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.utils.device import choose_device
from megatron.bridge.utils.distributed import init_process_group, rank, world_size

__all__ = [
    "disable_mtp_for_inference",
    "extract_expert_number_from_param",
    "get_last_rank",
    "get_local_rank_preinit",
    "get_master_addr_safe",
    "get_master_port_safe",
    "get_rank_safe",
    "get_world_size_safe",
    "is_last_rank",
    "maybe_initialize_distributed",
    "print_rank_0",
    "print_rank_last",
    "resolve_path",
]


def get_rank_safe() -> int:
    """This process's global rank; before the process group is up the launcher's `RANK`, or 0."""
    return rank()


def get_world_size_safe() -> int:
    """The number of processes; before the process group is up the launcher's `WORLD_SIZE`, or 1."""
    return world_size()


def get_last_rank() -> int:
    """The highest global rank: where the last pipeline stage, and so the loss, is."""
    return world_size() - 1


def get_local_rank_preinit() -> int:
    """This process's number on its machine, as the launcher says in `LOCAL_RANK`; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_master_addr_safe() -> str:
    """The machine that ranks meet on, as the launcher says in `MASTER_ADDR`; without one this machine."""
    return os.environ.get("MASTER_ADDR", "localhost")


def get_master_port_safe() -> int:
    """The port that ranks meet on, as the launcher says in `MASTER_PORT`; torchrun's own, 29500, without one."""
    return int(os.environ.get("MASTER_PORT", "29500"))


def is_last_rank() -> bool:
    """Whether this is the highest global rank."""
    return rank() == get_last_rank()


def print_rank_0(message: Any) -> None:
    """Print on global rank 0 alone."""
    if rank() == 0:
        print(message, flush=True)


def print_rank_last(message: Any) -> None:
    """Print on the highest global rank alone."""
    if is_last_rank():
        print(message, flush=True)


def maybe_initialize_distributed(*, distributed_backend: str = "auto", timeout_minutes: float = 10) -> bool:
    """Bring up the process group where a launcher started this process; without one there is none to join.

    Args:
        distributed_backend: `auto` (NCCL on CUDA, else gloo), `nccl` or `gloo`.
        timeout_minutes: After this long a collective that another rank never joins raises.

    Returns:
        Whether this call created the group, which is then the caller's to destroy.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    return init_process_group(choose_device(distributed_backend=distributed_backend), timeout_minutes)


def disable_mtp_for_inference(model: Any) -> None:
    """Let a model give the logits of the next token alone: no layers that predict further ones, no scaled loss.

    Args:
        model: A chunk, or a sequence of them, wrapped or not; changed.
    """
    from megatron.core.utils import get_model_config, unwrap_model

    for chunk in model if isinstance(model, Sequence) else [model]:
        config = get_model_config(chunk)
        config.mtp_num_layers = None
        config.grad_scale_func = None
        bare = unwrap_model(chunk)
        if hasattr(bare, "mtp_process"):
            bare.mtp_process = False


def extract_expert_number_from_param(param_name: str) -> int:
    """The number of the expert that a grouped weight or bias belongs to: 3 of `mlp.experts.linear_fc1.weight3`.

    Raises:
        ValueError: The name has none.
    """
    match = re.search(r"(?:weight|bias)(\d+)", param_name)
    if match is None:
        raise ValueError(f"{param_name!r} is no weight of an expert: expected a name such as linear_fc1.weight3")
    return int(match[1])


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """A path from the root, without `~`, links and dots; it need not exist."""
    return Path(path).expanduser().resolve()
