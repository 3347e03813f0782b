# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A run that is started again and again: its directory, the processes of its newest start, and what they reported."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.gpt_step import forward_step
from tests.rigs.stored import stored_content, unequal
from tests.soak.rank import RANKS, STEPS, train_one_rank

ALONE_SECONDS = 300
"""A rank must have ended after this long when its partner was killed, or when it can't write or read."""

RUN_SECONDS = 600
"""A start to which nothing is done must have ended after this long."""


class Run:
    """One run's directory and the processes of its newest start."""

    def __init__(self, directory: Path, *, forward_step_func: Callable = forward_step, **sections: Any) -> None:
        self.directory, self.sections, self.attempt = directory, sections, 0
        self.checkpoints = directory / "checkpoints"
        self.forward_step_func = forward_step_func
        self.processes: list[Any] = []
        self.started = 0.0
        self.reported = 0
        """The step that a start must resume from, or a later one: the last that was reported saved before it."""
        self.ckpt_step: int | None = None
        """Given to each start until one has saved: the user goes back to this step."""
        self._lines_before = [0] * RANKS
        self._said_before = [0] * RANKS
        directory.mkdir(exist_ok=True)

    def start(self, trouble: Callable[[int], None] | None = None) -> None:
        """Start both ranks.

        Args:
            trouble: Called in each rank, with its number, before it trains.
        """
        self._lines_before = self.log_lines()
        if not self.is_set_back():
            self.ckpt_step, self.reported = None, self._last_reported()
        self._said_before = [len(self._log(rank)) for rank in range(RANKS)]
        sections = {**self.sections}
        if self.ckpt_step is not None:
            sections["checkpoint"] = {**sections.get("checkpoint", {}), "ckpt_step": self.ckpt_step}
        common = (sections, self.forward_step_func, trouble)
        arguments = [(str(self.directory), self.attempt, rank, *common) for rank in range(RANKS)]
        self.processes = [context().Process(target=train_one_rank, args=each) for each in arguments]
        self.started = time.monotonic()
        for process in self.processes:
            process.start()
        self.attempt += 1

    def go_back_to(self, step: int) -> None:
        """Name an earlier checkpoint to the next starts, until one of them has saved."""
        self.ckpt_step = self.reported = step

    def is_set_back(self) -> bool:
        """Whether the next start will be given an earlier checkpoint."""
        return self.ckpt_step is not None and "saved step " not in self.said()

    def join(self, seconds: float) -> bool:
        """Wait for both ranks; whether they ended in time. Those that didn't are killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        in_time = all(process.exitcode is not None for process in self.processes)
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGUSR1)
                process.join(1)
            process.kill()
            process.join()
        return in_time

    def trains(self) -> bool:
        """Whether this start has taken a step on each rank."""
        return all(now > before for now, before in zip(self.log_lines(), self._lines_before, strict=True))

    def steps_taken(self) -> int:
        """Steps of this start, on the rank that took fewest."""
        return min(now - before for now, before in zip(self.log_lines(), self._lines_before, strict=True))

    def log_lines(self) -> list[int]:
        logs = [self.directory / f"losses_{rank}.txt" for rank in range(RANKS)]
        return [len(log.read_bytes().splitlines()) if log.exists() else 0 for log in logs]

    def is_running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def is_saving(self) -> bool:
        return any(self.checkpoints.glob(".iter_*.saving"))

    def has_ended_well(self) -> bool:
        return bool(self.processes) and all(process.exitcode == 0 for process in self.processes)

    def losses(self) -> list[dict[int, set[str]]]:
        """Of each rank: every loss that any start found at a step."""
        found = []
        for rank in range(RANKS):
            by_step: dict[int, set[str]] = {}
            for line in (self.directory / f"losses_{rank}.txt").read_text(encoding="utf-8").splitlines():
                step, loss = line.split()
                by_step.setdefault(int(step), set()).add(loss)
            found.append(by_step)
        return found

    def errors(self) -> str:
        """What the ranks said last, and where they were when they didn't end."""
        texts = [path.read_text(encoding="utf-8") for path in sorted(self.directory.glob("errors_*.txt"))]
        return "\n".join(text[-3000:] for text in texts)

    def said(self, rank: int = 0) -> str:
        """What a rank logged since this start."""
        return self._log(rank)[self._said_before[rank] :].decode(errors="replace")

    def resumed(self) -> tuple[int, float] | None:
        """The step that this start resumed from, and the seconds until it did; None: it didn't come so far."""
        found = re.search(r"^train from step (\d+) at (\S+)$", self.said(), flags=re.MULTILINE)
        return None if found is None else (int(found[1]), float(found[2]) - self.started)

    def _log(self, rank: int) -> bytes:
        path = self.directory / f"errors_{rank}.txt"
        return path.read_bytes() if path.exists() else b""

    def _last_reported(self) -> int:
        reports = re.findall(rb" saved step (\d+) ", self._log(0))
        return int(reports[-1]) if reports else 0


def context() -> Any:
    """Ranks are forked from a server that has imported what they need."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.rigs.preloaded"])
    return found


def warm_up() -> None:
    """Let the server that ranks are forked from do its imports, which are no part of a run."""
    process = context().Process(target=int)
    process.start()
    process.join()


def sleep_while(run: Run, seconds: float) -> None:
    """Sleep while the run's ranks run."""
    deadline = time.monotonic() + seconds
    while run.is_running() and time.monotonic() < deadline:
        time.sleep(0.001)


def wait_for(run: Run, condition: Callable[[], bool]) -> bool:
    """Until a condition holds; False where the run ends before."""
    while run.is_running():
        if condition():
            return True
        time.sleep(0.001)
    return False


def wait_for_saves(run: Run, number: int) -> None:
    """Until that many saves have begun to write, or the run ends."""
    seen: set[Path] = set(run.checkpoints.glob(".iter_*.saving"))
    begun = 0
    while run.is_running() and begun < number:
        there = set(run.checkpoints.glob(".iter_*.saving"))
        begun += len(there - seen)
        seen = there
        time.sleep(0.001)


def check_equal(run: Run, whole: Run) -> None:
    """Every loss of every start and each tensor of the last checkpoint are the uninterrupted run's, bit-exact."""
    assert run.losses() == whole.losses(), "a start found another loss than the uninterrupted run"
    first, second = (stored_content(each.checkpoints, STEPS) for each in (run, whole))
    differing = unequal(first, second)
    assert differing == set(), f"the last checkpoint differs from the uninterrupted run's: {sorted(differing)}"
    there = [iteration for iteration, _ in iterations.iterations(run.checkpoints)]
    # The one before goes when the next is complete: each start that is struck in between may leave one behind.
    most = 2 + run.attempt
    assert there[-2:] == [STEPS - 2, STEPS] and len(there) <= most, f"the newest two are kept, found {there}"
