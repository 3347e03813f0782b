# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Run a test's function on several ranks: a pool of processes that start once and serve many tests.

The imports cost 5 to 10 seconds, so they are done once a session, by a server that the ranks are forked from, and the
pools are kept: each size (1, 2, 4, …) once. Every rank has entered its device and joined the default process group;
Megatron-Core's model-parallel state is taken down after each task, because the threads of groups wake all the time. A
rank that fails shows its traceback; a task that overruns its time kills the pool, so nothing hangs.

Only the ranks of a test marked gpu compute on CUDA (`tests/rigs/gpus.py`): they are spawned, a fork doesn't bear CUDA.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.rigs import gpus

START_TIMEOUT_SECONDS = 600
TIMEOUT_SECONDS = 900
"""Both only end what hangs: on a slow or a busy machine ranks take ten times as long as on a quiet one."""

MOST_THREADS = 48
"""Of a rank at rest. Groups that something keeps alive leave their threads, which wake a hundred times a second each: a
few such ranks take the time of those that work, and new ones are forked in a second."""

is_quick = False
"""Whether the running test is one that `--quick` runs: then it is an error that it asks for ranks."""


class RankError(AssertionError):
    """The first failing rank's traceback."""


def run_on_ranks(
    fn: Callable, world_size: int, *args: Any, timeout_seconds: float = TIMEOUT_SECONDS, **kwargs: Any
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on each of `world_size` ranks.

    Args:
        fn: A module-level function of an importable module; it may use `torch.distributed` freely.
        world_size: Number of ranks.
        args: Picklable arguments.
        timeout_seconds: After this long the ranks are killed and the call fails.
        kwargs: Picklable arguments.

    Returns:
        Each rank's (picklable) result, in rank order.

    Raises:
        RankError: A rank raised or died, or the time ran out.
    """
    assert not is_quick, "this test needs ranks, so it isn't quick: tests/rigs/quick.py must see that it asks for them"
    key = world_size, gpus.device_of_ranks(world_size)
    pool = _pools.get(key)
    if pool is not None and (codes := pool.exit_codes()):
        warnings.warn(f"ranks ended between two tasks, with exit codes {codes}: new ones start", RuntimeWarning, 2)
        _pools.pop(key).kill()
        pool = None
    if pool is None:
        pool = _pools[key] = _Pool(*key)
    try:
        results, num_threads = zip(*pool.run((fn, args, kwargs), timeout_seconds), strict=True)
    except BaseException:
        _pools.pop(key).kill()
        raise
    if max(num_threads) > MOST_THREADS:
        _pools.pop(key).kill()
    return list(results)


def end_ranks(world_size: int) -> None:
    """End the pool of that size: the next task runs in processes that have seen none."""
    pool = _pools.pop((world_size, gpus.device_of_ranks(world_size)), None)
    if pool is not None:
        pool.kill()


def _context(device: str) -> Any:
    """What starts the ranks: a server that has imported everything and done nothing, or new processes."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rigs.preloaded"])
    return context


class _Pool:
    def __init__(self, world_size: int, device: str) -> None:
        context = _context(device)
        self._rendezvous = tempfile.mkdtemp(prefix="ranks_")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = theirs, rank, world_size, device, os.path.join(self._rendezvous, "store")
            process = context.Process(target=_serve, args=arguments, daemon=False)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._collect(START_TIMEOUT_SECONDS)

    def exit_codes(self) -> dict[int, int]:
        """Of the ranks that have ended, which they should do at the end of the session only."""
        return {rank: process.exitcode for rank, process in enumerate(self._processes) if process.exitcode is not None}

    def run(self, task: tuple, timeout_seconds: float) -> list[Any]:
        for connection in self._connections:
            connection.send(task)
        return self._collect(timeout_seconds)

    def _collect(self, timeout_seconds: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_seconds
        while len(results) < len(self._connections):
            pending = [c for rank, c in enumerate(self._connections) if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [rank for rank in range(len(self._connections)) if rank not in results]
                raise RankError(f"ranks {late} did not finish within {timeout_seconds} seconds")
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    failure, result = connection.recv()
                except EOFError:
                    self._processes[rank].join(1)
                    code = self._processes[rank].exitcode
                    raise RankError(f"rank {rank} died without a traceback, exit code {code}") from None
                if failure is not None:
                    raise RankError(f"rank {rank} failed:\n{failure}")
                results[rank] = result
        return [results[rank] for rank in range(len(self._connections))]

    def kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # a rank that had no time to lead its group
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self._processes:
            process.join()
        shutil.rmtree(self._rendezvous, ignore_errors=True)


_pools: dict[tuple[int, str], _Pool] = {}


@atexit.register
def _kill_pools() -> None:
    for pool in _pools.values():
        pool.kill()


def _serve(connection: Connection, rank: int, world_size: int, device: str, store: str) -> None:
    """A rank's life: join the group, then run what is sent, until the pipe closes."""
    os.setsid()  # a group of its own: what a rank starts, as stock Core's checkpoint writer does, must end with it
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    if device == "cpu":
        gpus.hide()  # whatever the server that it was forked from sees
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # Core builds 31 groups a run, and few are ever used
    try:
        import torch
        import torch.distributed as dist

        from megatron.bridge.utils.device import choose_device, enter_device
        from megatron.bridge.utils.distributed import destroy_model_parallel

        torch.set_num_threads(1)
        choice = enter_device(choose_device(device))
        dist.init_process_group(choice.backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
        import tests.rigs.preloaded  # noqa: F401  # where the rank was not forked

        connection.send((None, None))
    except BaseException:
        connection.send((traceback.format_exc(), None))
        raise
    while True:
        try:
            fn, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            result = fn(*args, **kwargs)
            destroy_model_parallel()
            gc.collect()  # a model that was let go still holds its groups until then, and they their threads
            connection.send((None, (result, _num_threads())))
        except BaseException:
            connection.send((traceback.format_exc(), None))


def _num_threads() -> int:
    """All of this process's, those that Python doesn't know too; 0 where the system doesn't say."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
