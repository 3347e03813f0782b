# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The number of threads of the optimizer's step on the host, and the cores on which they run.

torchrun starts each rank with one thread. Adam on the host is limited by memory bandwidth, and one core uses only a
small part of it. So an offloaded step uses this rank's share of the machine's cores, if possible those near its GPU.
Everything else in the process keeps its number of threads.

The result is bit-exact for any number of threads: torch's Adam splits its work at cache lines, so no element changes
between its vector and scalar code.
"""

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.bridge.utils.device import is_simulated, numa_node
from megatron.bridge.utils.distributed import all_gathered

NODES = Path("/sys/devices/system/node")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CAN_PIN = hasattr(os, "sched_setaffinity")
"""Whether threads can be bound to cores: on Linux."""


@dataclass(frozen=True)
class HostThreads:
    """Threads of one rank's host optimizer."""

    count: int
    """How many, at least 1."""

    cores: frozenset[int]
    """Numbers of the cores on which they may run."""

    reason: str
    """Where the number comes from, for the log."""


def parse_core_list(text: str) -> frozenset[int]:
    """The numbers in Linux's notation for sets of cores: "0-3,8" is 0, 1, 2, 3 and 8."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def own_cores(node: int | None = None, *, nodes: Path = NODES) -> tuple[frozenset[int], str]:
    """The cores that this process may use, those of its GPU's NUMA node where that is known, and what they are.

    Args:
        node: That NUMA node; None asks the device.
        nodes: Where the machine describes its nodes.
    """
    allowed = frozenset(os.sched_getaffinity(0)) if CAN_PIN else frozenset(range(os.cpu_count() or 1))
    node = numa_node() if node is None else node
    file = nodes / f"node{node}" / "cpulist"
    if node is not None and file.is_file() and (near := allowed & parse_core_list(file.read_text())):
        return near, f"cores of NUMA node {node}"
    return allowed, "cores"


def cpu_quota() -> float:
    """Cores' worth of time that the container may use; infinite where there is no limit."""
    limit, period = _QUOTA.read_text().split() if _QUOTA.is_file() else ("max", "1")
    return math.inf if limit == "max" else int(limit) / int(period)


def share_of_cores(own: frozenset[int], neighbours: list[frozenset[int]], quota: float = math.inf) -> int:
    """This rank's share of its cores, at least 1.

    Args:
        own: Cores that it may use.
        neighbours: The same of each rank on its machine, itself among them.
        quota: Cores' worth of time that they may use together.
    """
    share = sum(1 / sum(core in cores for cores in neighbours) for core in own)
    return max(1, int(min(share, quota / len(neighbours)) + 1e-9))


def plan_host_threads(num_threads: int | None) -> HostThreads | None:
    """How many threads this rank's host optimizer steps with. Collective.

    Args:
        num_threads: What the user asks for (`optimizer.optimizer_cpu_num_threads`). None: a share of the cores.

    Returns:
        None: as many as the process has. That is so where the device is simulated, on the very same cores.
    """
    if num_threads is None and is_simulated():
        return None
    own, kind = own_cores()
    if num_threads is not None:
        return HostThreads(num_threads, own, "optimizer.optimizer_cpu_num_threads")
    machine = socket.gethostname()
    neighbours = [cores for of_machine, cores in all_gathered((machine, own)) if of_machine == machine]
    ranks = f"{len(neighbours)} ranks" if len(neighbours) > 1 else "1 rank"
    count = share_of_cores(own, neighbours, cpu_quota())
    return HostThreads(count, own, f"{len(own)} {kind}, shared by {ranks} on this machine")


@contextlib.contextmanager
def using(threads: HostThreads) -> Iterator[None]:
    """Run the context with these threads, and what follows with those that the process had."""
    count, cores = torch.get_num_threads(), None
    if CAN_PIN:
        # New threads run where the one that starts them may run, and are started by the first parallel loop.
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, threads.cores)
    torch.set_num_threads(threads.count)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def step_with(optimizer: torch.optim.Optimizer, threads: HostThreads) -> None:
    """Let each step of an optimizer run with these threads, and the rest of the process with those that it had.

    Args:
        optimizer: A hybrid optimizer. Its hooks are used, so that it may set up its parts again at any time.
        threads: From `plan_host_threads`.
    """
    step = contextlib.ExitStack()
    optimizer.register_step_pre_hook(lambda *_: step.enter_context(using(threads)))
    optimizer.register_step_post_hook(lambda *_: step.close())
