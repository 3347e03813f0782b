# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Strike a training run with random faults, start it again each time, and see that it ends as if nothing had been.

    python -m tests.soak --faults 200 --write

Two ranks train a tiny model with half of the optimizer offloaded, saving every second step, with and without
`async_save`. The faults are those of `tests/soak/faults.py`, each kind as often. After each the run is started again:
it must resume from the last step that was reported saved, or a later one, except where the fault damaged that
checkpoint, which must be refused by name. When the last step is reached, every loss of every start and every tensor of
the last checkpoint are compared with the uninterrupted run's, bit-exact, and the next run begins, until all faults are
spent. `--write` puts the table into docs/reliability.md; a run of less than the usual number of faults doesn't.
"""

import argparse
import random
import shutil
import sys
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core import __version__ as core_version

from megatron.bridge.checkpoint import iterations
from megatron.bridge.training.monitoring.metrics import METRICS_FILE, read_metrics
from tests.soak.faults import FAULTS, Fault, complete
from tests.soak.run import RUN_SECONDS, Run, check_equal, wait_for, warm_up

USUAL_FAULTS = 200
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


@dataclass
class Soaked:
    """What the faults did."""

    struck: Counter[str] = field(default_factory=Counter)
    """How often, by kind."""

    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By kind: seconds until a start after the fault trained, the first that wasn't struck again before it did."""

    starts: int = 0
    runs: int = 0
    resumed_at: list[int] = field(default_factory=list)
    """The step that each start resumed from."""


def soak(
    faults: int, seed: int, *, kinds: Sequence[Fault] = FAULTS, show: Callable[[Soaked], None] = lambda soaked: None
) -> Soaked:
    """Strike runs until that many faults are spent, each kind as often.

    Args:
        faults: How many.
        seed: Of the random choices.
        kinds: Of faults.
        show: Called after each fault.

    Raises:
        AssertionError: A start lost what was reported saved, a rank hung, or a run didn't end as the uninterrupted one.
    """
    choose, soaked = random.Random(seed), Soaked()
    schedule = [kinds[index % len(kinds)] for index in range(faults)]
    choose.shuffle(schedule)
    with tempfile.TemporaryDirectory(prefix="soak_") as directory:
        whole = Run(Path(directory, "whole"))
        warm_up()
        whole.start()
        assert whole.join(RUN_SECONDS) and whole.has_ended_well(), whole.errors()
        while schedule:
            run = Run(Path(directory, f"run_{soaked.runs}"), checkpoint={"async_save": choose.random() < 0.5})
            _strike_until_it_ends(run, schedule, choose, soaked, show=show)
            check_equal(run, whole)
            _check_metrics(run)
            shutil.rmtree(run.directory)
            soaked.runs += 1
    return soaked


def _strike_until_it_ends(
    run: Run, schedule: list[Fault], choose: random.Random, soaked: Soaked, *, show: Callable[[Soaked], None]
) -> None:
    struck_since: list[str] = []
    while not run.has_ended_well():
        attempts = run.attempt
        fault = _next(run, schedule)
        struck = fault.strike(run, choose) if fault is not None else _go_on(run, until_saved=bool(schedule))
        if run.attempt > attempts:
            soaked.starts += run.attempt - attempts
            _check_resumed(run, soaked, struck_since)
        if struck:
            schedule.remove(fault)
            soaked.struck[fault.name] += 1
            struck_since.append(fault.name)
            show(soaked)


def _next(run: Run, schedule: list[Fault]) -> Fault | None:
    """The next fault that can strike this run now."""
    is_led_there = not run.is_set_back() and (run.checkpoints / iterations.TRACKER_FILE).exists()
    there = len(complete(run)) if is_led_there else 0
    return next((fault for fault in schedule if fault.needs <= there), None)


def _go_on(run: Run, *, until_saved: bool) -> bool:
    """Start the run and let it end; or until it has saved what the faults that are left need. Strikes nothing."""
    run.start()
    if until_saved and wait_for(run, lambda: "saved step " in run.said() and len(complete(run)) > 1):
        for process in run.processes:
            process.kill()
    assert run.join(RUN_SECONDS), f"the start hung\n{run.errors()}"
    return False


def _check_resumed(run: Run, soaked: Soaked, struck_since: list[str]) -> None:
    """What this start resumed from, if it trained, after the faults that struck since another did."""
    resumed = run.resumed()
    if resumed is None:
        return
    step, seconds = resumed
    assert step >= run.reported, f"resumed from {step}, but step {run.reported} was reported saved\n{run.errors()}"
    assert run.ckpt_step in (None, step), f"resumed from {step}, asked for {run.ckpt_step}\n{run.errors()}"
    soaked.resumed_at.append(step)
    for name in struck_since:
        soaked.recoveries[name].append(seconds)
    struck_since.clear()


def _check_metrics(run: Run) -> None:
    """No clock misled the run's figures."""
    for line in read_metrics(run.checkpoints / METRICS_FILE):
        assert 0 < line["step_seconds"] < RUN_SECONDS and 0 <= line["elapsed_seconds"] < RUN_SECONDS, line


def report(soaked: Soaked, *, seed: int, seconds: float) -> str:
    """The results, in Markdown."""
    rows = []
    for name in (kind.name for kind in FAULTS if kind.name in soaked.struck):
        longest = f"{max(soaked.recoveries[name]):.1f} s" if soaked.recoveries[name] else "-"
        rows.append(f"| {name} | {soaked.struck[name]} | {longest} |")
    summary = (
        f"megatron-core {core_version}, seed {seed}: {soaked.struck.total()} faults in {soaked.runs} runs and "
        f"{soaked.starts} starts, {seconds:.0f} s. Nothing that was reported saved was lost, and every run ended "
        "bit-exact."
    )
    return "\n".join(
        (
            textwrap.fill(summary, 120),
            "",
            "| fault | struck | longest until a start trained again |",
            "|---|---|---|",
            *rows,
        )
    )


def write(text: str, document: Path = DOCUMENT) -> None:
    """Put a report into the document, between the marks of this version of megatron-core.

    Raises:
        ValueError: The document has no such marks.
    """
    begin, end = (f"<!-- {word} of make soak, megatron-core {core_version} -->" for word in ("begin", "end"))
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{document} has no {begin!r} with its end: expected one for each tested megatron-core")
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=USUAL_FAULTS, help=f"how many (default: {USUAL_FAULTS})")
    parser.add_argument("--seed", type=int, default=None, help="of the random choices (default: a new one each time)")
    parser.add_argument("--only", default="", help="only kinds of faults whose name holds this text")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    began = time.monotonic()

    def show(soaked: Soaked) -> None:
        done = soaked.struck.total()
        bar = "#" * (40 * done // arguments.faults)
        end = "\n" if done == arguments.faults or not sys.stdout.isatty() else "\r"
        print(f"[{bar:40}] {done}/{arguments.faults} faults, {time.monotonic() - began:.0f} s", end=end, flush=True)

    kinds = [kind for kind in FAULTS if arguments.only in kind.name]
    soaked = soak(arguments.faults, seed, kinds=kinds, show=show)
    text = report(soaked, seed=seed, seconds=time.monotonic() - began)
    print(text)
    if arguments.write and arguments.faults >= USUAL_FAULTS and not arguments.only:
        write(text)
        print(f"written into {DOCUMENT}")
    elif arguments.write:
        print(f"{DOCUMENT} stays as it is: it holds runs of all kinds and at least {USUAL_FAULTS} faults")


if __name__ == "__main__":
    main()
