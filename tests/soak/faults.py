# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What `tests.soak` does to a run: a table of faults. Each starts the run, or what belongs to it, and strikes once.

What a fault must lead to is asserted here: who is left ends by itself, what can't continue ends on all ranks in one
line that names the place. What comes after (the next start resumes, the run ends bit-exact) is `tests.soak`'s.
"""

import contextlib
import os
import random
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.bridge.checkpoint import iterations
from tests.soak.rank import RANKS, clock_jumps, disk_fills_up, export
from tests.soak.run import ALONE_SECONDS, RUN_SECONDS, Run, context, sleep_while, wait_for, wait_for_saves

HOURS = 48
"""How far a clock jumps at most, at once."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    name: str

    strike: Callable[[Run, random.Random], bool]
    """Whether it struck: a start may end before its moment comes. No process is left when it returns."""

    needs: int = 0
    """How many complete checkpoints must be there before."""


def complete(run: Run) -> list[int]:
    """The complete iterations, oldest first."""
    return [iteration for iteration, path in iterations.iterations(run.checkpoints) if iterations.is_complete(path)]


# SIGKILL: one rank or all, at a moment.


def _at_any_moment(run: Run, choose: random.Random) -> bool:
    sleep_while(run, choose.uniform(0, 3.0))
    return run.is_running()


def _in_a_step(run: Run, choose: random.Random) -> bool:
    steps = choose.randint(1, 5)
    if not wait_for(run, lambda: run.steps_taken() >= steps):
        return False
    sleep_while(run, choose.uniform(0, 0.05))
    return wait_for(run, lambda: not run.is_saving())


def _in_a_save(run: Run, choose: random.Random) -> bool:
    wait_for_saves(run, choose.randint(1, 3))
    sleep_while(run, choose.uniform(0, 0.1))
    return run.is_running()


def _in_a_load(run: Run, choose: random.Random) -> bool:
    if not wait_for(run, lambda: "] I loading " in run.said()):
        return False
    sleep_while(run, choose.uniform(0, 0.05))
    return "] I loaded in " not in run.said()


def _kill(run: Run, choose: random.Random, *, moment: Callable[[Run, random.Random], bool], all_ranks: bool) -> bool:
    run.start()
    if not moment(run, choose):
        assert run.join(RUN_SECONDS), f"the start hung\n{run.errors()}"
        return False
    victims = range(RANKS) if all_ranks else [choose.randrange(RANKS)]
    for rank in victims:
        run.processes[rank].kill()
    if "] I loading " in run.said() or run.trains():
        assert run.join(ALONE_SECONDS), f"a rank hung after rank(s) {list(victims)} were killed\n{run.errors()}"
    else:
        run.join(1)  # ranks that still wait to meet can't notice: whoever started them ends them
    return any(process.exitcode == -9 for process in run.processes)


# A disk that takes no more, a directory that can't be written: all ranks end in one line.


def _no_space_for_a_file(run: Run, choose: random.Random) -> bool:
    victim = choose.randrange(RANKS)
    after = choose.randint(0, 40) if victim == 0 else choose.randint(0, 5)
    run.start(partial(disk_fills_up, root=str(run.checkpoints), victim=victim, after=after))
    return _ends_with(run, "No space left on device")


def _no_space_within_a_file(run: Run, choose: random.Random) -> bool:
    run.start()
    if not wait_for(run, lambda: run.steps_taken() >= 1):
        return False
    limit = choose.randrange(150_000, 400_000)  # more than the logs have, less than the tensors' files
    victim = run.processes[choose.randrange(RANKS)].pid
    with contextlib.suppress(ProcessLookupError):  # it may just have ended
        resource.prlimit(victim, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return _ends_with(run, "File too large")


def _read_only(run: Run, choose: random.Random) -> bool:
    run.start()
    if choose.random() < 0.7:
        sleep_while(run, choose.uniform(0, 1.0))
    else:
        wait_for_saves(run, choose.randint(1, 3))
    run.checkpoints.mkdir(exist_ok=True)
    run.checkpoints.chmod(0o555)
    try:
        return _ends_with(run, "Permission denied")
    finally:
        run.checkpoints.chmod(0o755)


def _ends_with(run: Run, reason: str) -> bool:
    """Whether the ranks ended in an error, each in one line; False where all was written before the fault."""
    assert run.join(ALONE_SECONDS), f"a rank hung: {reason}\n{run.errors()}"
    if run.has_ended_well():
        return False
    for rank in range(RANKS):
        line = error_line(run, rank)
        assert reason in line and str(run.checkpoints) in line, f"rank {rank} said {line!r}\n{run.errors()}"
    return True


def error_line(run: Run, rank: int) -> str:
    """The last line of a traceback: what the user reads."""
    lines = re.findall(r"^\w*Error: .*", run.said(rank), flags=re.MULTILINE)
    return lines[-1] if lines else ""


# Files of the newest checkpoint, damaged while nothing runs: the next start names the file and refuses.


def _tear(run: Run, choose: random.Random, *, damage: Callable[[bytes, random.Random], bytes]) -> bool:
    directory = iterations.find_checkpoint(run.checkpoints)
    path = choose.choice(sorted(path for path in directory.rglob("*") if path.is_file()))
    path.write_bytes(damage(path.read_bytes(), choose))
    run.start()
    _is_refused(run, path.name)
    steps = [step for step in complete(run) if iterations.checkpoint_name(run.checkpoints, step) != directory]
    run.go_back_to(steps[-1])
    return True


def _cut(content: bytes, choose: random.Random) -> bytes:
    return content[: choose.randrange(len(content))]


def _zeros_inside(content: bytes, choose: random.Random) -> bytes:
    """What a power cut leaves of a page that was not yet written."""
    start = choose.choice([place for place in range(0, len(content), 512) if any(content[place : place + 4096])])
    length = len(content[start : start + 4096])
    return content[:start] + bytes(length) + content[start + length :]


def _tear_the_tracker(run: Run, choose: random.Random) -> bool:
    tracker = run.checkpoints / iterations.TRACKER_FILE
    text, newest = tracker.read_text(), complete(run)[-1]
    tracker.write_text(choose.choice([text[:-1], "", "\0" * len(text), f"{text}\0\0"]))
    run.start()
    _is_refused(run, iterations.TRACKER_FILE)
    assert str(newest) in error_line(run, 0), "the refusal doesn't say what may be written into it"
    tracker.write_text(str(newest))
    return True


def _is_refused(run: Run, name: str) -> None:
    assert run.join(ALONE_SECONDS), f"a rank hung: {name} was damaged\n{run.errors()}"
    for rank in range(RANKS):
        assert name in error_line(run, rank), f"rank {rank} doesn't name {name}, which was damaged\n{run.errors()}"
    assert run.resumed() is None, f"a start took {name}, which was damaged"


# Clocks.


def _jump(run: Run, choose: random.Random, *, hours: int) -> bool:
    """All files are suddenly of another day, each another; and the clock keeps jumping until the ranks are killed."""
    for path in run.checkpoints.rglob("*"):
        then = time.time() + 3600 * choose.uniform(0, hours)
        os.utime(path, (then, then))
    run.start(partial(clock_jumps, hours=hours, seed=choose.randrange(10**6)))
    if not (wait_for(run, run.trains) and _at_any_moment(run, choose)):
        assert run.has_ended_well(), run.errors()
        return False
    for process in run.processes:
        process.kill()
    assert run.join(ALONE_SECONDS), run.errors()
    codes = {process.exitcode for process in run.processes}
    assert codes <= {0, -9}, f"a rank ended by itself\n{run.errors()}"  # 0: it ended a moment before
    return -9 in codes


# An export: there in full or not at all, and made again over what a killed one left.


def _kill_an_export(run: Run, choose: random.Random) -> bool:
    undisturbed, target = run.directory / "undisturbed", run.directory / "export"
    if choose.random() < 0.5:
        _export(run, target)  # an earlier one to replace
    seconds = _export(run, undisturbed)
    process = context().Process(target=export, args=(str(run.directory), str(target)))
    process.start()
    process.join(choose.uniform(0, seconds))
    process.kill()
    process.join()
    struck = process.exitcode == -9
    if target.exists():
        assert _bytes_of(target).keys() == _bytes_of(undisturbed).keys(), "a part of an export under its name"
    _export(run, target)
    assert _bytes_of(target) == _bytes_of(undisturbed), "the repeated export has other bytes"
    return struck


def _export(run: Run, target: Path) -> float:
    """Seconds that an export took."""
    began = time.monotonic()
    process = context().Process(target=export, args=(str(run.directory), str(target)))
    process.start()
    process.join(RUN_SECONDS)
    assert process.exitcode == 0, run.errors()
    return time.monotonic() - began


def _bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _kills(moment: Callable[[Run, random.Random], bool], when: str, *, needs: int = 0) -> list[Fault]:
    return [
        Fault(f"SIGKILL of {whom}, {when}", partial(_kill, moment=moment, all_ranks=all_ranks), needs)
        for whom, all_ranks in (("one rank", False), ("all ranks", True))
    ]


FAULTS = (
    *_kills(_at_any_moment, "at any moment"),
    *_kills(_in_a_step, "in a step"),
    *_kills(_in_a_save, "in a save"),
    *_kills(_in_a_load, "in a load", needs=1),
    Fault("SIGKILL of an export", _kill_an_export, needs=1),
    Fault("disk full: no space for a file", _no_space_for_a_file),
    Fault("disk full: no space within a file", _no_space_within_a_file),
    Fault("read-only directory", _read_only),
    Fault("truncated file", partial(_tear, damage=_cut), needs=2),
    Fault("torn file", partial(_tear, damage=_zeros_inside), needs=2),
    Fault("torn tracker", _tear_the_tracker, needs=1),
    Fault("clock jumps back", partial(_jump, hours=-HOURS)),
    Fault("clock jumps ahead", partial(_jump, hours=HOURS)),
)
