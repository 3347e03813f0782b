# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What this machine can do: the link between host and device, and Adam on either side. Takes about half a second."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from megatron.bridge.offload_engine.host_memory import Slab
from megatron.bridge.offload_engine.host_threads import HostThreads, using
from megatron.bridge.utils import device
from megatron.bridge.utils.distributed import all_gathered, barrier

ELEMENTS = 1 << 23
"""Of each measurement: a bucket."""

_ROUNDS = 3


@dataclass(frozen=True)
class Ceilings:
    """The most that one rank can do while all others do the same."""

    to_host: float
    """Bytes a second from the device to pinned memory."""
    to_device: float
    """Bytes a second, the other way."""
    both_ways: float
    """Bytes a second, both directions together."""
    host_adam: float
    """Parameters a second that Adam steps on at the host, with this rank's threads, while copies go both ways."""
    device_adam: float
    """Parameters a second that Adam steps on at the device."""
    host_adam_alone: float
    """As `host_adam`, without copies beside it, with which it shares the host's memory."""
    host_rounding: float
    """Parameters a second that the host rounds from FP32 to BF16."""

    def __str__(self) -> str:
        return (
            f"link {self.to_host / 1e9:.1f} GB/s to the host, {self.to_device / 1e9:.1f} to the device, "
            f"{self.both_ways / 1e9:.1f} both ways; Adam {self.host_adam / 1e9:.2f} G parameters/s on the host, "
            f"{self.device_adam / 1e9:.0f} on the device"
        )


ASSUMED = Ceilings(
    to_host=55e9,
    to_device=55e9,
    both_ways=91e9,
    host_adam=3.6e9,
    device_adam=120e9,
    host_adam_alone=4.1e9,
    host_rounding=10.6e9,
)
"""Of one H200 with 16 cores (torch 2.11, 2026-11-26), for where nothing can be measured. `host_adam` is reckoned from
what steps with overlap took there (docs/performance.md)."""


def measure_ceilings(threads: HostThreads | None) -> Ceilings:
    """Measure them on all ranks at once. Collective.

    Args:
        threads: Those of this rank's host optimizer; None: as many as the process has.

    Returns:
        The worst of all ranks, the same on each.
    """
    barrier()
    with torch.no_grad():
        own = _measure(threads)
    return Ceilings(*map(min, zip(*all_gathered(astuple(own)), strict=True)))


def _measure(threads: HostThreads | None) -> Ceilings:
    slab = Slab([torch.Size([ELEMENTS])] * 2, pinned=True)
    down, up = slab.tensors
    there = torch.ones(2, ELEMENTS, device=device.current_device())
    streams = device.new_stream(), device.new_stream()
    num_bytes = ELEMENTS * there.element_size()

    def copy_down() -> None:
        with device.on_stream(streams[0]):
            down.copy_(there[0], non_blocking=True)

    def copy_up() -> None:
        with device.on_stream(streams[1]):
            there[1].copy_(up, non_blocking=True)

    def copy_both_ways() -> None:
        copy_down()
        copy_up()

    on_host = _adam(torch.zeros(ELEMENTS, device="cpu"))
    rounded = torch.empty(ELEMENTS, device="cpu", dtype=torch.bfloat16)
    on_device = _adam(torch.zeros(ELEMENTS, device=device.current_device()))
    to_host, to_device, both_ways = (_seconds(copy) for copy in (copy_down, copy_up, copy_both_ways))
    device_seconds = _seconds(on_device.step)
    with contextlib.nullcontext() if threads is None else using(threads):
        alone_seconds = _seconds(on_host.step)
        host_seconds = _seconds(on_host.step, beside=copy_both_ways)
        rounding_seconds = _seconds(lambda: rounded.copy_(up))
    return Ceilings(
        to_host=num_bytes / to_host,
        to_device=num_bytes / to_device,
        both_ways=2 * num_bytes / both_ways,
        host_adam=ELEMENTS / host_seconds,
        device_adam=ELEMENTS / device_seconds,
        host_adam_alone=ELEMENTS / alone_seconds,
        host_rounding=ELEMENTS / rounding_seconds,
    )


def _adam(param: torch.Tensor) -> torch.optim.Optimizer:
    param.grad = torch.full_like(param, 1e-3)
    return torch.optim.AdamW([param], fused=True)


def _seconds(work: Callable[[], object], beside: Callable[[], object] | None = None) -> float:
    """The shortest time of some rounds, after one that isn't counted; with other work under way as long."""
    times = []
    for _ in range(1 + _ROUNDS):
        device.synchronize()
        for _ in range(0 if beside is None else 8):
            beside()  # type: ignore[misc]  # None has no rounds
        began = time.perf_counter()
        work()
        if beside is None:
            device.synchronize()
        times.append(time.perf_counter() - began)
    device.synchronize()
    return max(min(times[1:]), 1e-9)
