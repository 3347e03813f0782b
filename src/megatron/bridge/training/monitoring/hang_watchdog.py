# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A rank that hangs, or waits for one that does, prints its stacks and ends within the process groups' timeout.

A collective times out by itself. A rank that never reaches one doesn't, and no traceback says where it is. So each rank
watches itself: it sends a heartbeat before each micro-batch and after each step.
"""

import contextlib
import faulthandler
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from megatron.bridge.training.config import DistributedInitConfig
from megatron.bridge.utils.distributed import rank, world_size
from megatron.bridge.utils.exit_codes import HUNG

logger = logging.getLogger(__name__)

_SHOWN_AT = 0.8
"""Fraction of the timeout after which stacks are printed: before another rank's collective times out and ends all."""

_ENDED_AT = 0.95
"""Fraction of the timeout after which the process ends. The ranks' timers start at slightly different times, and all
must have printed their stacks by then."""


class Hung(SystemExit):
    """This rank hung until another one ended and broke its collective. A script then ends with `exit_codes.HUNG`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(HUNG)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.error("%s; it came after this rank's stacks were shown: exit code %d", reason, HUNG)


class HangWatchdog:
    """A thread that expects heartbeats of the main thread.

    Args:
        clock: Gives seconds.
        end_process: Ends this process with an exit code, at once.
        num_ranks: Gives the number of ranks.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        end_process: Callable[[int], Any] = os._exit,
        num_ranks: Callable[[], int] = world_size,
    ) -> None:
        self._clock, self._end_process, self._num_ranks = clock, end_process, num_ranks
        self._timeout_seconds = math.inf
        self._last_sign = math.inf
        self._step = 0
        self._shown_for = math.nan
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, timeout_seconds: float) -> None:
        """Expect heartbeats from now on. A single process is not watched: it has no other rank to wait for.

        Args:
            timeout_seconds: The process groups' timeout; later calls change it.
        """
        self._timeout_seconds = timeout_seconds
        if self._thread is None and self._num_ranks() > 1:
            self._last_sign = self._clock()
            self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)
            self._thread.start()

    def heartbeat(self, step: int) -> None:
        """Report that this rank is alive, after `step` steps."""
        self._step = step
        self._last_sign = self._clock()

    @property
    def hangs(self) -> bool:
        """Whether stacks were printed and no heartbeat has come since."""
        return self._shown_for == self._last_sign

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Expect no heartbeats within the context: writing a checkpoint may take longer than the timeout."""
        self._last_sign = math.inf
        try:
            yield
        finally:
            self._last_sign = self._clock()

    def stop(self) -> None:
        """Expect no more heartbeats."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, max(0.01, self._seconds_until(_SHOWN_AT)))):
            if self._seconds_until(_SHOWN_AT) > 0:
                continue
            last_sign = self._last_sign
            self._shown_for = last_sign
            self._show()
            while last_sign == self._last_sign and not self._stopped.wait(0.01):
                if self._seconds_until(_ENDED_AT) <= 0:
                    self._end_process(HUNG)  # the main thread is stuck, so it can't raise anything

    def _seconds_until(self, part: float) -> float:
        return self._last_sign + part * self._timeout_seconds - self._clock()

    def _show(self) -> None:
        """Print all threads' stacks in one write, since ranks often share one standard error."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace").splitlines()
        waited = self._clock() - self._last_sign
        head = (
            f"rank {rank()} hangs: no sign of life for {waited:.1f} s after step {self._step}; it ends after "
            f"{_ENDED_AT * self._timeout_seconds:.1f} s with exit code {HUNG} (dist.distributed_timeout_minutes)"
        )
        text = "".join(f"[rank {rank()}] {line}\n" for line in (head, *stacks))
        os.write(2, text.encode())


@contextlib.contextmanager
def watched(watchdog: HangWatchdog, config: DistributedInitConfig) -> Iterator[None]:
    """Watch this rank within the context.

    Raises:
        Hung: In place of an error that was raised after its stacks were printed, usually by a broken collective.
    """
    watchdog.start(60 * config.distributed_timeout_minutes)
    try:
        yield
    except Exception as error:
        if watchdog.hangs:
            raise Hung(error) from error
        raise
    finally:
        watchdog.stop()


def shorten_timeouts(watchdog: HangWatchdog, config: DistributedInitConfig) -> None:
    """Set `dist.distributed_timeout_seconds_after_init`, if given. Called after the first step, which may be slow."""
    seconds = config.distributed_timeout_seconds_after_init
    if seconds is not None:
        from megatron.core import parallel_state

        parallel_state.update_pg_timeout(timedelta(seconds=seconds))
        watchdog.start(seconds)
