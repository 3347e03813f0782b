# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The device a process computes on: the one place that chooses between CUDA and a host without it."""

import logging
import os
import resource
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from megatron.bridge.utils import simulated_accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceChoice:
    """Where tensors live and what carries the collectives, with the reason it was chosen."""

    type: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]
    reason: str


_entered: DeviceChoice | None = None


def choose_device(device: str = "auto", distributed_backend: str = "auto") -> DeviceChoice:
    """Choose the device and the collective backend.

    Args:
        device: `auto` (CUDA where torch sees it), `cuda`, or `cpu` (the simulated accelerator).
        distributed_backend: `auto` (NCCL on CUDA, else gloo), `nccl` or `gloo`.

    Raises:
        ValueError: An unknown name, CUDA asked for where there is none, or NCCL without CUDA.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"dist.device={device!r}: expected 'auto', 'cuda' or 'cpu'")
    if distributed_backend not in ("auto", "nccl", "gloo"):
        raise ValueError(f"dist.distributed_backend={distributed_backend!r}: expected 'auto', 'nccl' or 'gloo'")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("dist.device='cuda', but torch finds no CUDA device: set dist.device=auto or dist.device=cpu")
    kind = "cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu"
    if kind == "cpu" and distributed_backend == "nccl":
        raise ValueError(
            "dist.distributed_backend='nccl' needs CUDA, and this process computes on the CPU: "
            "set dist.distributed_backend=auto or gloo"
        )
    if device == "auto":
        reason = "torch finds a CUDA device" if has_cuda else "torch finds no CUDA device"
    else:
        reason = f"dist.device={device}"
    backend = distributed_backend if distributed_backend != "auto" else ("nccl" if kind == "cuda" else "gloo")
    return DeviceChoice(kind, backend, reason)


def enter_device(choice: DeviceChoice | None = None) -> DeviceChoice:
    """Make this process compute on the chosen device. Entering the same device again does nothing.

    Args:
        choice: From `choose_device`; None chooses automatically (or keeps the device already entered).

    Raises:
        RuntimeError: Another device was entered before, or CUDA is initialised and `cpu` is asked for.
    """
    global _entered
    if choice is None:
        choice = _entered or choose_device()
    if _entered is not None:
        if _entered.type != choice.type:
            raise RuntimeError(
                f"this process already computes on {_entered.type} ({_entered.reason}); "
                f"{choice.type} ({choice.reason}) needs a new process"
            )
        return _entered
    if choice.type == "cpu":
        simulated_accelerator.install()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    _entered = choice
    logger.info("device: %s with %s (%s)", choice.type, choice.backend, choice.reason)
    return choice


def is_simulated() -> bool:
    """Whether device tensors are simulated in host memory."""
    return simulated_accelerator.is_installed()


def current_device() -> torch.device:
    """The device that tensors of this process are made on: a CUDA device, or the (simulated) `cuda` device name.

    Both are accepted wherever torch takes a device; under simulation the tensors lie in host memory.
    """
    enter_device()
    return torch.device("cuda", torch.cuda.current_device())


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on the (simulated) device, not on the host."""
    return tensor.is_cuda


def synchronize() -> None:
    """Wait for the device's queued work."""
    enter_device()
    torch.cuda.synchronize()


def wait_for_stream(stream: torch.Stream) -> None:
    """Let what the current stream is given from now on wait for what `stream` was given so far."""
    torch.cuda.current_stream().wait_stream(stream)


def device_rng_state() -> torch.Tensor:
    """The state of the device's generator, uint8 on the host; under simulation that of torch's only generator."""
    enter_device()
    return torch.cuda.get_rng_state()


def set_device_rng_state(state: torch.Tensor) -> None:
    """Put a state from `device_rng_state` back."""
    enter_device()
    torch.cuda.set_rng_state(state)


def profiled_activities() -> list[torch.profiler.ProfilerActivity]:
    """What torch's profiler records here: the host's work, and the device's where there is a real one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    return activities if is_simulated() else [*activities, torch.profiler.ProfilerActivity.CUDA]


def peak_memory_bytes() -> int:
    """Peak device memory allocated so far, in bytes; under simulation the process's peak resident memory."""
    if is_simulated() or not torch.cuda.is_available():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return torch.cuda.max_memory_allocated()
