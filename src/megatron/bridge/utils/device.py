# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The device that a process computes on: the only place that chooses between CUDA and a host without it."""

import contextlib
import functools
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron.bridge.utils import simulated_accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceChoice:
    """The device and the backend of the collectives, with the reason for the choice."""

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
    kind: Literal["cuda", "cpu"] = "cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu"
    if kind == "cpu" and distributed_backend == "nccl":
        raise ValueError(
            "dist.distributed_backend='nccl' needs CUDA, and this process computes on the CPU: "
            "set dist.distributed_backend=auto or gloo"
        )
    if device == "auto":
        reason = "torch finds a CUDA device" if has_cuda else "torch finds no CUDA device"
    else:
        reason = f"dist.device={device}"
    backend: Literal["nccl", "gloo"] = "nccl" if kind == "cuda" and distributed_backend != "gloo" else "gloo"
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


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in host memory: the tensor itself if it is there already, as under simulation, else a copy."""
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def synchronize() -> None:
    """Wait for the device's queued work."""
    enter_device()
    torch.cuda.synchronize()


def wait_for_stream(stream: torch.cuda.Stream) -> None:
    """Let later work on the current stream wait for all work that is queued on `stream` now."""
    torch.cuda.current_stream().wait_stream(stream)


def new_stream() -> torch.cuda.Stream:
    """A new stream. Its work is in no order with that of other streams but by waits."""
    return torch.cuda.Stream()


def current_stream() -> torch.cuda.Stream:
    """The stream on which work is queued now."""
    return torch.cuda.current_stream()


def on_stream(stream: torch.cuda.Stream) -> contextlib.AbstractContextManager:
    """Queue the work of the context on `stream`, in no order with the current one."""
    return torch.cuda.stream(stream)


def timed_event() -> torch.cuda.Event:
    """An event that knows when it was reached: `start.elapsed_time(end)` is in milliseconds."""
    return torch.cuda.Event(enable_timing=True)


@contextlib.contextmanager
def queued_on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Queue the work of the context on `stream`, in order with the current stream.

    It starts after all work that is queued on the current stream now, and later work on the current stream waits for
    it. The host doesn't wait.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    stream.record_event().wait(torch.cuda.current_stream())


def start_after_current(stream: torch.cuda.Stream) -> None:
    """Let later work on `stream` wait for all work that is queued on the current stream now."""
    stream.wait_stream(torch.cuda.current_stream())


def wait_for_event(event: torch.cuda.Event) -> None:
    """Let later work on the current stream wait for an event."""
    event.wait(torch.cuda.current_stream())


def entrance() -> Callable[[], None]:
    """What a new thread calls to compute on this thread's device."""
    if is_simulated():
        return simulated_accelerator.enter_thread
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def bypass_simulation() -> contextlib.AbstractContextManager:
    """Within the context the simulated accelerator doesn't intercept torch calls.

    For speed, in loops over many tensors that only read or copy them.
    """
    return torch._C.DisableTorchFunction()


def host_tensor(memory: Any, place: int, size: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A flat tensor in existing host memory, with a storage of exactly its size. It keeps the memory alive.

    Args:
        memory: Anything with Python's buffer protocol.
        place: The first element, counted in elements.
        size: In elements; not 0.
        dtype: Of the elements.
    """
    tensor = torch.frombuffer(memory, dtype=dtype, offset=dtype.itemsize * place, count=size)
    return simulated_accelerator.on_host(tensor) if is_simulated() else tensor


def lock_pages(memory: Any) -> int | None:
    """Pin host memory, so that copies from and to the device are asynchronous.

    Unlike torch's pinned tensors the memory keeps its exact size. Tested on an H200 on 2026-11-27.

    Returns:
        The argument for `unlock_pages`; None if the device is simulated.

    Raises:
        RuntimeError: The system can't pin that much memory.
    """
    if is_simulated() or not torch.cuda.is_available():
        return None
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    failure = int(torch.cuda.cudart().cudaHostRegister(address, len(memory), 0))
    if failure:
        raise RuntimeError(
            f"{len(memory):,} bytes of host memory can't be pinned (CUDA error {failure}): raise the limit on locked "
            "memory, or set optimizer.pin_cpu_params=False and optimizer.pin_cpu_grads=False"
        )
    return address


def unlock_pages(address: int) -> None:
    """Undo `lock_pages`."""
    if not sys.is_finalizing():
        torch.cuda.cudart().cudaHostUnregister(address)


RNG_STATE_BYTES = {16: "a GPU", 5056: "a simulated accelerator"}
"""Kind of device by the size of its random state in bytes. CUDA's state is only a seed and an offset."""


def numa_node() -> int | None:
    """The NUMA node that this process's GPU is attached to; None where it isn't known, as under simulation."""
    if is_simulated() or not torch.cuda.is_available():
        return None
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    if not hasattr(properties, "pci_domain_id"):  # torch says it since 2.8
        return None
    place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    file = Path("/sys/bus/pci/devices") / place / "numa_node"
    node = int(file.read_text()) if file.is_file() else -1
    return node if node >= 0 else None


def device_rng_state() -> torch.Tensor:
    """The device's random state, uint8 on the host. Under simulation it is that of torch's generator of the host."""
    enter_device()
    return torch.cuda.get_rng_state()


def set_device_rng_state(state: torch.Tensor) -> None:
    """Restore a state from `device_rng_state`."""
    enter_device()
    torch.cuda.set_rng_state(state)


def profiled_activities() -> list[torch.profiler.ProfilerActivity]:
    """The activities that torch's profiler records: the host's, and those of a real device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    return activities if is_simulated() else [*activities, torch.profiler.ProfilerActivity.CUDA]


def peak_memory_bytes() -> int:
    """Peak device memory allocated so far, in bytes; under simulation the process's peak resident memory."""
    if is_simulated() or not torch.cuda.is_available():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return torch.cuda.max_memory_allocated()


def has_gpu() -> bool:
    """Whether this process computes on a real device."""
    return not is_simulated() and torch.cuda.is_available()


def memory_stats() -> dict[str, int]:
    """`torch.cuda.memory_stats()`; under simulation the process's resident memory, as both allocated and reserved."""
    if not has_gpu():
        current, peak = _resident_bytes(), peak_memory_bytes()
        kinds = {"current": current, "peak": max(current, peak)}
        return {f"{what}_bytes.all.{kind}": size for what in ("allocated", "reserved") for kind, size in kinds.items()}
    torch.cuda.init()  # it is empty before
    return torch.cuda.memory_stats()


def free_memory_bytes() -> int | None:
    """Device memory that this process can still allocate; None under simulation, whose device has none of its own."""
    if not has_gpu():
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def device_memory_used_bytes() -> int:
    """What all processes use of this process's device, as nvidia-smi shows it; under simulation of the host."""
    if not has_gpu():
        host = Path("/proc/meminfo")
        if not host.is_file():
            return _resident_bytes()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in host.read_text().splitlines()}
        return 1024 * (kib["MemTotal"] - kib["MemAvailable"])
    free, total = torch.cuda.mem_get_info()
    return total - free


def _resident_bytes() -> int:
    """Resident memory of this process; its peak where the system has no /proc."""
    statistics = Path("/proc/self/statm")
    if not statistics.is_file():
        return peak_memory_bytes()
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class EnergyCounter:
    """The energy that this process's device has used, as the driver counts it. Untested: no machine had NVML."""

    def __init__(self) -> None:
        """Find the device among the machine's, whichever of them this process sees.

        Raises:
            ImportError: The package nvidia-ml-py isn't installed.
            RuntimeError: There is no GPU, or it doesn't count energy.
        """
        import pynvml

        if not has_gpu():
            raise RuntimeError("there is no GPU")
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.joules()
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML can't read it ({error})") from error

    def joules(self) -> float:
        """Since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


def start_device_profiler() -> None:
    """Let a profiler that waits for CUDA's range of capture, such as Nsight Systems, record from now on."""
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())


def stop_device_profiler() -> None:
    """End what `start_device_profiler` began."""
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())


def record_memory_history() -> None:
    """Record each allocation on the device, with its stack, from now on."""
    torch.cuda.memory._record_memory_history()


def write_memory_history(path: Path) -> None:
    """Write what was recorded, and stop recording."""
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
