# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Kill a training run at random moments, start it again each time, and see that it ends as if nothing had been.

    python -m tests.soak --kills 50

Two ranks train a tiny model with half of the optimizer offloaded, saving every second step, with and without
`async_save`. SIGKILL goes to one rank or to both, at any moment from the start of the processes on or while a save's
files are being written. Each start must find the newest complete checkpoint; a rank that is left alone in training must
end by itself. When the last step is reached, every loss of every start and every tensor of the last checkpoint are
compared with the uninterrupted run's, to the bit, and the next run is killed, until all kills are spent.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.training.gpt_step import forward_step
from tests.soak_rank import RANKS, STEPS, train_one_rank

ALONE_SECONDS = 60
"""A rank whose partner was killed in training must have ended after this long."""

RUN_SECONDS = 120
"""A start that isn't killed must have ended after this long."""


@dataclass
class Soaked:
    """What the kills did."""

    kills: Counter[str] = field(default_factory=Counter)
    """By what was killed when."""

    starts: int = 0
    runs: int = 0
    resumed_at: list[int] = field(default_factory=list)
    """The step that each start after a kill went on from."""

    slowest_survivor_seconds: float = 0.0


class Run:
    """One run's directory and the processes of its newest start."""

    def __init__(self, directory: Path, *, forward_step_func: Callable = forward_step, **sections: Any) -> None:
        self.directory, self.sections, self.attempt = directory, sections, 0
        self.forward_step_func = forward_step_func
        self.processes: list[Any] = []
        self._lines_before = [0] * RANKS
        directory.mkdir(exist_ok=True)

    def start(self) -> None:
        """Start both ranks."""
        self._lines_before = self.log_lines()
        common = (self.sections, self.forward_step_func)
        arguments = [(str(self.directory), self.attempt, rank, *common) for rank in range(RANKS)]
        self.processes = [_context().Process(target=train_one_rank, args=each) for each in arguments]
        for process in self.processes:
            process.start()
        self.attempt += 1

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

    def log_lines(self) -> list[int]:
        logs = [self.directory / f"losses_{rank}.txt" for rank in range(RANKS)]
        return [len(log.read_bytes().splitlines()) if log.exists() else 0 for log in logs]

    def is_running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def has_ended_well(self) -> bool:
        return all(process.exitcode == 0 for process in self.processes)

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


def soak(kills: int, seed: int, *, show: Callable[[Soaked], None] = lambda soaked: None) -> Soaked:
    """Kill runs until that many kills are spent.

    Args:
        kills: SIGKILLs to one or all ranks of a start.
        seed: Of the random choices.
        show: Called after each kill.

    Raises:
        AssertionError: A start didn't resume, a rank hung, or a run didn't end as the uninterrupted one.
    """
    choose, soaked = random.Random(seed), Soaked()
    with tempfile.TemporaryDirectory(prefix="soak_") as directory:
        whole = Run(Path(directory, "whole"))
        warm_up()
        began = time.monotonic()
        whole.start()
        assert whole.join(RUN_SECONDS) and whole.has_ended_well(), whole.errors()
        duration = time.monotonic() - began
        while sum(soaked.kills.values()) < kills:
            checkpoint = {"async_save": choose.random() < 0.5}
            run = Run(Path(directory, f"run_{soaked.runs}"), checkpoint=checkpoint)
            _kill_until_it_ends(run, kills, choose, soaked, duration=duration, show=show)
            check_equal(run, whole)
            shutil.rmtree(run.directory)
            soaked.runs += 1
    return soaked


def warm_up() -> None:
    """Let the server that ranks are forked from do its imports, which are no part of a run."""
    process = _context().Process(target=int)
    process.start()
    process.join()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.soak_rank"])
    return context


def _kill_until_it_ends(
    run: Run, kills: int, choose: random.Random, soaked: Soaked, *, duration: float, show: Callable[[Soaked], None]
) -> None:
    while True:
        before = _newest(run)
        run.start()
        soaked.starts += 1
        if soaked.starts > 1 and run.attempt > 1:
            soaked.resumed_at.append(before)
        if sum(soaked.kills.values()) >= kills:
            assert run.join(RUN_SECONDS), f"the start hung\n{run.errors()}"
        else:
            spent = sum(soaked.kills.values())
            _kill_once(run, choose, soaked, duration=duration)
            if sum(soaked.kills.values()) > spent:
                show(soaked)
        if run.has_ended_well():
            return
        assert any(process.exitcode == -9 for process in run.processes), f"no rank was killed\n{run.errors()}"


def _kill_once(run: Run, choose: random.Random, soaked: Soaked, *, duration: float) -> None:
    """Kill one rank or all at a moment of this start, unless it ends before."""
    victims = choose.choice([[0], [1], [0, 1]])
    when = choose.choice(["at any moment", "during a save"])
    if when == "at any moment":
        sleep_while(run, choose.uniform(0, duration))
    else:
        wait_for_saves(run, choose.randint(1, 4))
        sleep_while(run, choose.uniform(0, 0.15))
    if not run.is_running():
        return
    trains, killed = run.trains(), time.monotonic()
    for rank in victims:
        run.processes[rank].kill()
    soaked.kills[f"{'all ranks' if len(victims) == RANKS else 'one rank'} {when}"] += 1
    if trains:
        assert run.join(ALONE_SECONDS), f"a rank hung after rank(s) {victims} were killed\n{run.errors()}"
        soaked.slowest_survivor_seconds = max(soaked.slowest_survivor_seconds, time.monotonic() - killed)
    else:
        run.join(1)  # ranks that still wait to meet can't notice: whoever started them ends them


def sleep_while(run: Run, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while run.is_running() and time.monotonic() < deadline:
        time.sleep(0.001)


def wait_for_saves(run: Run, number: int) -> None:
    """Until that many saves have begun to write, or the run ends."""
    seen: set[Path] = set((run.directory / "checkpoints").glob(".iter_*.saving"))
    begun = 0
    while run.is_running() and begun < number:
        there = set((run.directory / "checkpoints").glob(".iter_*.saving"))
        begun += len(there - seen)
        seen = there
        time.sleep(0.001)


def _newest(run: Run) -> int:
    from megatron.bridge.checkpoint import layout

    tracker = layout.read_tracker(run.directory / "checkpoints")
    return 0 if tracker is None else tracker.iteration


def check_equal(run: Run, whole: Run) -> None:
    """Every loss of every start and each tensor of the last checkpoint are the uninterrupted run's, to the bit."""
    from megatron.bridge.checkpoint import layout
    from tests.stored import stored_content, unequal

    assert run.losses() == whole.losses(), "a start found another loss than the uninterrupted run"
    first, second = (stored_content(each.directory / "checkpoints", STEPS) for each in (run, whole))
    differing = unequal(first, second)
    assert differing == set(), f"the last checkpoint differs from the uninterrupted run's: {sorted(differing)}"
    there = [iteration for iteration, _ in layout.iterations(run.directory / "checkpoints")]
    # One more may lie there: a run that is killed after its last save has nothing more to save, nor to prune then.
    assert there[-2:] == [STEPS - 2, STEPS] and len(there) <= 3, f"the newest two are kept, found {there}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments (default: a new one each time)")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    began = time.monotonic()

    def show(soaked: Soaked) -> None:
        done = sum(soaked.kills.values())
        bar = "#" * (40 * done // arguments.kills)
        end = "\n" if done == arguments.kills or not sys.stdout.isatty() else "\r"
        print(f"[{bar:40}] {done}/{arguments.kills} kills, {time.monotonic() - began:.0f} s", end=end, flush=True)

    soaked = soak(arguments.kills, seed, show=show)
    by_kind = ", ".join(f"{number} {kind}" for kind, number in sorted(soaked.kills.items()))
    print(
        f"{sum(soaked.kills.values())} kills ({by_kind}) in {soaked.runs} runs and {soaked.starts} starts: every run "
        f"ended bit-equal to the uninterrupted one; a surviving rank ended after "
        f"{soaked.slowest_survivor_seconds:.1f} s at most; {time.monotonic() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
