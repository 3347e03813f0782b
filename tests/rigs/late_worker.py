# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A worker that is as late, or as early, as a thread may be: the order among adversarial streams says when it runs.

In place of a thread it runs its tasks where the main thread hands them over or waits for them. So what the main thread
reads without waiting is seen, and a run can be repeated. Not simulated: a task that is interrupted halfway.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from tests.rigs.device_queues import SIDES_FIRST


class _Later:
    def __init__(self, worker: "LateWorker", task: Callable[[], None]) -> None:
        self._worker, self._task = worker, task
        self.is_done, self.failure = False, None

    def run(self) -> None:
        self.is_done = True
        if self._worker.failure is None:
            try:
                # A new thread issues its work to the default stream.
                with torch.cuda.stream(torch.cuda.default_stream()):
                    self._task()
            except Exception as failure:
                self._worker.failure = failure
        self.failure = self._worker.failure

    def result(self) -> Any:
        self._worker.run_until(self)
        if self.failure is not None:
            raise self.failure


class LateWorker:
    """Takes the place of `HostWorker`."""

    def __init__(self, order: str | int) -> None:
        self._order, self._random = order, random.Random(order)
        self._tasks: deque[_Later] = deque()
        self.failure: Exception | None = None

    def submit(self, task: Callable[[], None]) -> _Later:
        later = _Later(self, task)
        self._tasks.append(later)
        while self._tasks and self._is_ahead():
            self._tasks.popleft().run()
        return later

    def _is_ahead(self) -> bool:
        if isinstance(self._order, int):
            return self._random.random() < 0.5
        return self._order == SIDES_FIRST

    def run_until(self, later: _Later) -> None:
        """No more than is waited for."""
        while not later.is_done:
            self._tasks.popleft().run()
