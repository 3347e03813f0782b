# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The thread that steps on the host beside the main thread."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from megatron.bridge.offload_engine.host_threads import CAN_PIN, HostThreads
from megatron.bridge.utils import device


class Task(Protocol):
    """Work that was handed to a worker."""

    def result(self) -> Any:
        """Wait until it is done.

        Raises:
            Exception: What the work raised, or the work before it, without which it wasn't begun.
        """


class HostWorker:
    """One thread that takes tasks in order. After a task that failed it begins no other."""

    def __init__(self, threads: HostThreads | None) -> None:
        """Start the thread.

        Args:
            threads: Threads and cores for its parallel loops. None: as many as the process has.
        """
        count = torch.get_num_threads()
        self._failure: BaseException | None = None
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="host-optimizer", initializer=_enter, initargs=(device.entrance(), threads)
        )
        self._executor.submit(int).result()
        torch.set_num_threads(count)  # torch gives new threads the number that was set last, by whichever thread

    def submit(self, task: Callable[[], None]) -> Task:
        """Queue a task behind those that are queued already. Returns at once."""
        return self._executor.submit(self._run, task)

    def _run(self, task: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            task()
        except BaseException as failure:
            self._failure = failure
            raise


def _enter(enter_device: Callable[[], None], threads: HostThreads | None) -> None:
    """Prepare the new thread: the device of the one that started it, and its share of the cores."""
    enter_device()
    if threads is not None:
        if CAN_PIN:
            os.sched_setaffinity(0, threads.cores)
        torch.get_num_threads()  # a thread that has never asked takes the process's number at its first loop
        torch.set_num_threads(threads.count)
