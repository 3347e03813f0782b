# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Figures on their way to a place that may be away: they wait and are offered again, and the training never waits."""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from megatron.bridge.training.state import GlobalState

Line = tuple[GlobalState, str, dict[str, Any]]
"""A state, a split and its figures."""

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Lines of figures that wait; then the oldest is given up."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0
"""Between two tries; each pause is twice the one before."""

SECONDS_WITHOUT_PROGRESS = 10.0
"""How long the end of a run waits for a place that takes nothing."""

_TRIES_FOR_ONE = 2
"""After that many failures of a line the next ones are tried too: where one is taken, the place isn't away."""

_MOST_TRIED = 4


class MetricsQueue:
    """Hands lines of figures to one place, in order.

    Args:
        name: The place, for the log.
        write: Takes a state, a split and its figures; whatever it raises means that it didn't take them.
        at_once: Write in the thread that hands over, which takes no time where the place is a local file. Otherwise a
            thread of its own writes.
    """

    def __init__(self, name: str, write: Callable[[GlobalState, str, dict[str, Any]], None], *, at_once: bool) -> None:
        self._name, self._write = name, write
        self._waiting: deque[Line] = deque()
        self._news = threading.Condition()
        self._ends = False
        self._failures = self._num_taken = self._num_lost = 0
        self._next_try = 0.0
        self._thread: threading.Thread | None = None
        if not at_once:
            self._thread = threading.Thread(target=self._carry, name=f"figures for {name}", daemon=True)
            self._thread.start()

    def hand_over(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Queue a line; `write` sees the step as it is now. Raises nothing, and waits for nothing but a local file."""
        kept = copy.copy(state)
        kept.train_state = copy.copy(state.train_state)
        with self._news:
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft()
                self._num_lost += 1
            self._waiting.append((kept, split, values))
            self._news.notify()
        if self._thread is None and time.monotonic() >= self._next_try:
            self._send()

    def finish(self, close: Callable[[], None]) -> None:
        """Try some last times, then close the place. A place that answers nothing isn't waited for.

        Args:
            close: May raise, or never return.
        """
        self._send_the_rest()
        is_away = bool(self._waiting)
        closing = threading.Thread(target=self._close, args=(close,), name=f"closing {self._name}", daemon=True)
        if is_away:  # otherwise in this thread, which opened it: MLflow's active run belongs to that
            closing.start()
            closing.join(SECONDS_WITHOUT_PROGRESS)
        else:
            self._close(close)
        num_lost = self._num_lost + len(self._waiting)
        if num_lost:
            logger.info("%s did not take %d lines of figures", self._name, num_lost)

    def _send_the_rest(self) -> None:
        if self._thread is None:
            self._send_last()
            return
        with self._news:
            self._ends = True
            self._news.notify()
        seen = -1
        while self._thread.is_alive() and seen != self._num_taken:
            seen = self._num_taken
            self._thread.join(SECONDS_WITHOUT_PROGRESS)

    def _close(self, close: Callable[[], None]) -> None:
        try:
            close()
        except Exception as error:
            level = logging.INFO if self._failures else logging.WARNING  # an outage is said once
            logger.log(level, "%s could not be closed (%s); the run isn't touched by it", self._name, _one_line(error))

    def _carry(self) -> None:
        """The thread's life."""
        while True:
            with self._news:
                while not self._ends and (pause := self._pause()) != 0.0:
                    self._news.wait(pause)
                if self._ends:
                    break
            self._send()
        self._send_last()

    def _send_last(self) -> None:
        """Whatever the pause; one failure, even the first, doesn't lose what waits behind it."""
        for _ in range(_TRIES_FOR_ONE):
            self._send()
            if not self._waiting:
                return
            time.sleep(FIRST_PAUSE_SECONDS)
        self._send()

    def _pause(self) -> float | None:
        """Seconds until the next try; None where nothing waits."""
        return max(0.0, self._next_try - time.monotonic()) if self._waiting else None

    def _send(self) -> None:
        """Write what waits, until it fails."""
        while self._waiting:
            with self._news:
                lines = list(islice(self._waiting, _MOST_TRIED if self._failures >= _TRIES_FOR_ONE else 1))
            refusal: BaseException | None = None
            for line in lines:
                refusal = self._try(line)
                if refusal is None:
                    self._note_success(line)
                    break
            if refusal is not None:
                self._note_failure(refusal, lines[0])
                return

    def _try(self, line: Line) -> BaseException | None:
        try:
            self._write(*line)
        except BaseException as error:  # a thread's SystemExit would end it without a word
            if self._thread is None and not isinstance(error, Exception):
                raise
            return error
        return None

    def _note_success(self, line: Line) -> None:
        """Take a line that was written from the queue; those before it were refused."""
        with self._news:
            while any(line is other for other in self._waiting):
                self._num_lost += self._waiting.popleft() is not line
        self._num_taken += 1
        if self._failures:
            self._failures = 0
            logger.info("%s takes figures again, from step %d", self._name, line[0].train_state.step)

    def _note_failure(self, error: BaseException, line: Line) -> None:
        pause = min(FIRST_PAUSE_SECONDS * 2**self._failures, LONGEST_PAUSE_SECONDS)
        self._next_try = time.monotonic() + pause
        if not self._failures:
            logger.warning(
                "%s did not take the figures of step %d (%s): the run continues; they wait and are offered again",
                self._name,
                line[0].train_state.step,
                _one_line(error),
            )
        self._failures += 1


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
