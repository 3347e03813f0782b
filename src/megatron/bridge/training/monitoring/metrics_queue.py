# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Send metrics to a destination that may be unavailable. They are queued and retried; training never waits for them."""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron.bridge.training.state import GlobalState

Line = tuple[GlobalState, str, dict[str, Any]]
"""A state, a split and its metrics."""

logger = logging.getLogger(__name__)

_TRIES_FOR_ONE = 2
"""After this many failures of a line, the lines behind it are tried too. If one of them is accepted, the destination
is available and refuses that line."""

_MOST_TRIED = 4


@dataclass(frozen=True)
class Patience:
    """How long lines wait for their destination, and the end of a run for it."""

    most_waiting: int = 10_000
    """Lines that wait at most; beyond it the oldest is dropped."""

    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 300.0
    """Between two attempts; each pause is twice the one before."""

    seconds_without_progress: float = 10.0
    """How long the end of a run waits for a destination that accepts nothing."""


class MetricsQueue:
    """Sends lines of metrics to one destination, in order.

    Args:
        name: The destination, for the log.
        write: Writes a state, a split and its metrics. If it raises, the line counts as not written.
        at_once: Write in the calling thread, for a local file, which is fast. Otherwise write in a separate thread.
        patience: How long lines wait.
        clock: Gives seconds.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[GlobalState, str, dict[str, Any]], None],
        *,
        at_once: bool,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._write, self._patience, self._clock = name, write, patience, clock
        self._waiting: deque[Line] = deque()
        self._news = threading.Condition()
        self._ends = False
        self._failures = self._num_taken = self._num_lost = 0
        self._next_try = 0.0
        self._thread: threading.Thread | None = None
        if not at_once:
            self._thread = threading.Thread(target=self._carry, name=f"metrics for {name}", daemon=True)
            self._thread.start()

    def hand_over(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Queue a line with a snapshot of the train state. Never raises, and never waits, except for a local file."""
        kept = copy.copy(state)
        kept.train_state = copy.copy(state.train_state)
        with self._news:
            if len(self._waiting) >= self._patience.most_waiting:
                self._waiting.popleft()
                self._num_lost += 1
            self._waiting.append((kept, split, values))
            self._news.notify()
        if self._thread is None and self._clock() >= self._next_try:
            self._send()

    def finish(self, close: Callable[[], None]) -> None:
        """Retry what is queued a last few times, then close the destination. Doesn't wait for one that doesn't respond.

        Args:
            close: Closes the destination. It may raise, or never return.
        """
        self._send_the_rest()
        is_away = bool(self._waiting)
        closing = threading.Thread(target=self._close, args=(close,), name=f"closing {self._name}", daemon=True)
        if is_away:  # otherwise close in this thread, which opened it: MLflow's active run belongs to the thread
            closing.start()
            closing.join(self._patience.seconds_without_progress)
        else:
            self._close(close)
        num_lost = self._num_lost + len(self._waiting)
        if num_lost:
            logger.info("%s did not accept %d lines of metrics", self._name, num_lost)

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
            self._thread.join(self._patience.seconds_without_progress)

    def _close(self, close: Callable[[], None]) -> None:
        try:
            close()
        except Exception as error:
            level = logging.INFO if self._failures else logging.WARNING  # warn of an outage only once
            logger.log(level, "%s could not be closed (%s); the run is not affected", self._name, _one_line(error))

    def _carry(self) -> None:
        """Main function of the thread."""
        while True:
            with self._news:
                while not self._ends and (pause := self._pause()) != 0.0:
                    self._news.wait(pause)
                if self._ends:
                    break
            self._send()
        self._send_last()

    def _send_last(self) -> None:
        """Send what is queued without waiting for the pause. One failure doesn't lose the lines behind it."""
        for _ in range(_TRIES_FOR_ONE):
            self._send()
            if not self._waiting:
                return
            time.sleep(self._patience.first_pause_seconds)
        self._send()

    def _pause(self) -> float | None:
        """Seconds until the next try; None if the queue is empty."""
        return max(0.0, self._next_try - self._clock()) if self._waiting else None

    def _send(self) -> None:
        """Write what is queued, until a write fails."""
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
        except BaseException as error:  # a SystemExit would end the thread silently
            if self._thread is None and not isinstance(error, Exception):
                raise
            return error
        return None

    def _note_success(self, line: Line) -> None:
        """Remove a line that was written, and those before it, which the destination refused."""
        with self._news:
            while any(line is other for other in self._waiting):
                self._num_lost += self._waiting.popleft() is not line
        self._num_taken += 1
        if self._failures:
            self._failures = 0
            logger.info("%s accepts metrics again, from step %d on", self._name, line[0].train_state.step)

    def _note_failure(self, error: BaseException, line: Line) -> None:
        pause = min(self._patience.first_pause_seconds * 2**self._failures, self._patience.longest_pause_seconds)
        self._next_try = self._clock() + pause
        if not self._failures:
            logger.warning(
                "%s did not accept the metrics of step %d (%s): the run continues, and they are sent again later",
                self._name,
                line[0].train_state.step,
                _one_line(error),
            )
        self._failures += 1


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
