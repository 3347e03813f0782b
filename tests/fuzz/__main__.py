# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Feed damaged and invented input to everything that reads a stranger's file or a command line.

    make fuzz                                     # 100,000 inputs, 500 damaged checkpoints; writes docs/reliability.md
    make fuzz ARGS="--inputs 2000 -k index"       # fewer, of the readers with this word in their names

Whatever comes in, a reader gives what it read, or one of its documented errors, in one line, soon, in bounded memory.
Inputs are valid ones that were damaged (bytes flipped, cut out, doubled, words of the format put in), and invented
ones. What breaks the rule is made small and printed. Each reader is fed in a process of its own.
"""

import argparse
import logging
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from tests.fuzz import checkpoint_readers, data_readers
from tests.fuzz.data_readers import Reader, fast_disk
from tests.rigs import damages

WHOLE = 100_000
SECONDS_FOR_ONE = 5
SECONDS_WITHOUT_PROGRESS = 120
"""After these a process is ended: it hangs where Python can't interrupt it."""

MEMORY_BYTES = 8 << 30
"""What a process may take beyond what it has after its imports; above it allocations fail."""

DOCUMENTED = (ValueError, FileNotFoundError)
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- make fuzz writes from here -->", "<!-- to here -->"


def readers() -> list[Reader]:
    """All of them. What they import takes seconds."""
    return [*data_readers.readers(), *checkpoint_readers.readers()]


@st.composite
def damaged(draw: Any, seeds: tuple[bytes, ...], words: tuple[bytes, ...]) -> bytes:
    """A valid input with some damage."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 6)))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(("flip", "cut", "double", "word", "bytes", "end")))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:end]
        elif kind == "double":
            content[at:at] = content[at:end]
        elif kind == "word":
            content[at:end] = draw(st.sampled_from(words))
        elif kind == "bytes":
            content[at:end] = draw(st.binary(max_size=8))
        elif kind == "end":
            del content[at:]
    return bytes(content)


def inputs_for(reader: Reader) -> st.SearchStrategy[bytes]:
    """Mostly damaged inputs: invented ones seldom get past the first check."""
    joined = st.lists(st.sampled_from(reader.words), max_size=8).map(b"".join)
    return st.one_of(damaged(reader.seeds, reader.words), damaged(reader.seeds, reader.words), joined, st.binary())


def feed(reader: Reader, *, inputs: int, seed: int, progress: Any = None) -> None:
    """Feed inputs to a reader; what breaks the rule is raised, made small by hypothesis.

    Args:
        reader: The reader.
        inputs: How many.
        seed: Of the inputs.
        progress: A shared number; 1 is added for each input.

    Raises:
        AssertionError: An error that isn't documented, or of several lines, or something was executed.
    """
    folder = Path(tempfile.mkdtemp(dir=fast_disk()))
    before = os.getcwd()
    os.chdir(folder)

    @settings(
        max_examples=inputs,
        deadline=SECONDS_FOR_ONE * 1000,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(inputs_for(reader))
    def holds(content: bytes) -> None:
        path = folder / "input" / reader.name
        path.write_bytes(content)
        if progress is not None:
            progress.value += 1
        try:
            reader.read(path)
            reader.accepted += 1
        except DOCUMENTED as error:
            reader.refused += 1
            assert not isinstance(error, UnicodeError), f"a bare {type(error).__name__}: {error}"
            assert str(error) and "\n" not in str(error), f"not one line: {error!r}"
        assert not os.path.exists("hacked"), "the input was executed"

    (folder / "input").mkdir()
    try:
        with_seed(seed)(holds)()
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


@dataclass
class Job:
    """Work in a process of its own, which says how far it is."""

    name: str
    work: Callable[["Job"], list[str]]
    """Returns the cells of its row."""

    progress: Any = field(default_factory=lambda: multiprocessing.Value("Q", 0, lock=False))
    cells: list[str] | None = None
    broken: str = ""
    """How it broke the rule, in words."""

    seconds: float = 0.0

    def start(self) -> None:
        """Fork."""
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(target=_live, args=(self, sender))
        self._started = self._moved = time.monotonic()
        self._seen = 0
        self._process.start()
        sender.close()

    def is_over(self) -> bool:
        """Look whether it has ended, and end it where it hangs."""
        now = time.monotonic()
        if self.progress.value != self._seen:
            self._seen, self._moved = self.progress.value, now
        if self._receiver.poll():
            try:
                self.cells, self.broken = self._receiver.recv()
            except EOFError:
                self._process.join()
                self.broken = f"its process died, exit code {self._process.exitcode}, at input {self._seen}"
        elif now - self._moved > SECONDS_WITHOUT_PROGRESS:
            self.broken = f"it hung at input {self._seen}"
            self._process.kill()
        else:
            return False
        self._process.join()
        self.seconds = now - self._started
        return True


def _live(job: Job, sender: Connection) -> None:
    """A job's process."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES,) * 2)
    logging.disable(logging.CRITICAL)
    cells, broken = None, ""
    try:
        cells = job.work(job)
    except BaseException as error:
        notes = "\n    ".join(getattr(error, "__notes__", []))
        broken = f"{type(error).__name__}: {str(error)[:2000]}\n    {notes[:4000]}"
        if not notes:
            broken += traceback.format_exc()
    sender.send((cells, broken))


def _feeding(reader: Reader, inputs: int, seed: int) -> Job:
    def work(job: Job) -> list[str]:
        feed(reader, inputs=inputs, seed=seed, progress=job.progress)
        return [str(reader.accepted + reader.refused), str(reader.accepted), str(reader.refused)]

    return Job(reader.name, work)


def _damaging(number: int, seed: int) -> Job:
    def work(job: Job) -> list[str]:
        def count() -> None:
            job.progress.value += 1

        tallies = damages.run(damages=number, seed=seed, progress=count)
        rows = [
            f"| {mode} ({damages.MODES[mode]}) | {tally.loads} | {tally.refused} | {tally.without_effect} | "
            f"{tally.unnoticed.total()} |"
            for mode, tally in tallies.items()
        ]
        return ["\n".join(rows)]

    return Job("damaged checkpoints", work)


def run_jobs(jobs: list[Job], at_once: int) -> None:
    """Run all of them, so many at a time; a row is printed as each ends."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            running[-1].start()
        for job in [job for job in running if job.is_over()]:
            running.remove(job)
            row = "  ".join(cell.rjust(8) for cell in job.cells or ())
            print(f"{job.name:<32}{row}  {job.seconds:8.1f} s  {job.broken and 'BROKEN: ' + job.broken}", flush=True)
        time.sleep(0.1)


def as_document(feedings: list[Job], damaging: Job, *, seed: int, seconds: float, at_once: int) -> str:
    """What goes between the marks in docs/reliability.md."""
    import megatron.core

    total = sum(int(job.cells[0]) for job in feedings)
    rows = [f"| `{job.name}` | {' | '.join(job.cells)} |" for job in feedings]
    return "\n".join(
        [
            f"Last run: megatron-core {megatron.core.__version__}, seed {seed}, {total:,} inputs, {seconds / 60:.0f} "
            f"minutes on {at_once} processes.",
            "",
            "| read by | inputs | read | refused |",
            "|---|---|---|---|",
            *rows,
            "",
            "| checkpoint | damages | refused | without effect | loaded as something else |",
            "|---|---|---|---|---|",
            damaging.cells[0],
        ]
    )


def write_document(text: str, path: Path = DOCUMENT) -> None:
    """Put a text between the marks."""
    page = path.read_text(encoding="utf-8")
    between = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    if len(between.findall(page)) != 1:
        raise ValueError(f"{path} hasn't {BEGIN!r} and {END!r}, once: put them back")
    path.write_text(between.sub(lambda _: f"\n{text}\n\n", page), encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=WHOLE, help="of all readers together (default: %(default)s)")
    parser.add_argument("--damages", type=int, default=500, help="loads of a damaged checkpoint (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs (default: the time)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}, where the run is whole and clean")
    parser.add_argument("-k", dest="word", default="", help="only the readers with this in their names")
    return parser


def main() -> int:
    """Parse, feed, print; 1 where a reader broke the rule."""
    arguments = build_parser().parse_args()
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"seed {seed}\n{'reader':<32}{'inputs':>8}{'read':>10}{'refused':>10}", flush=True)
    started = time.monotonic()
    all_readers = readers()
    chosen = [reader for reader in all_readers if arguments.word in reader.name]
    shares = sum(reader.share for reader in chosen)
    feedings = [_feeding(reader, int(arguments.inputs * reader.share / shares) + 1, seed) for reader in chosen]
    damaging = _damaging(arguments.damages, seed)
    jobs = [job for job in (damaging, *feedings) if arguments.word in job.name]
    run_jobs(jobs, arguments.jobs)
    seconds = time.monotonic() - started
    broken = sum(bool(job.broken) for job in jobs)
    print(f"{seconds:.0f} s, {broken} of {len(jobs)} broke the rule")
    is_whole = arguments.inputs >= WHOLE and arguments.damages >= 500 and jobs == [damaging, *feedings]
    if arguments.write and is_whole and not broken and len(chosen) == len(all_readers):
        write_document(as_document(feedings, damaging, seed=seed, seconds=seconds, at_once=arguments.jobs))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
