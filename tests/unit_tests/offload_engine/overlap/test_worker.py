# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The worker's thread takes tasks in order, keeps its own number of threads, and stops at an error."""

import threading
import time

import pytest
import torch

from megatron.bridge.offload_engine.host_threads import HostThreads, own_cores
from megatron.bridge.offload_engine.overlap import worker
from megatron.bridge.offload_engine.overlap.worker import HostWorker
from megatron.bridge.utils.device import enter_device, is_on_device

pytestmark = pytest.mark.any_core


@pytest.fixture(autouse=True)
def _device():
    enter_device()


def test_tasks_run_in_order_beside_the_main_thread():
    host, seen, is_free = HostWorker(None), [], threading.Event()
    tasks = [host.submit(is_free.wait), host.submit(lambda: seen.append(1)), host.submit(lambda: seen.append(2))]
    assert seen == []
    is_free.set()
    for task in tasks:
        task.result()
    assert seen == [1, 2]


def test_an_error_is_raised_by_each_that_waits_and_begins_no_other_task():
    host, begun = HostWorker(None), []

    def fail() -> None:
        raise MemoryError("none left")

    tasks = [host.submit(fail), host.submit(lambda: begun.append(1))]
    for task in (*tasks, *tasks):
        with pytest.raises(MemoryError, match="none left"):
            task.result()
    assert begun == []


def test_it_has_its_own_number_of_threads_and_the_device_of_the_main_thread():
    before, seen = torch.get_num_threads(), []
    host = HostWorker(HostThreads(before + 1, own_cores()[0], "asked for"))
    host.submit(lambda: seen.extend((torch.get_num_threads(), is_on_device(torch.empty(1))))).result()
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (torch.get_num_threads(), seen) == (before, [before + 1, True, before])


def test_it_is_ready_once_it_is_built(monkeypatch):
    entered = []
    monkeypatch.setattr(worker.device, "entrance", lambda: lambda: [time.sleep(0.2), entered.append(1)])
    HostWorker(None)
    assert entered == [1]
