# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Whether the tests would notice: break the sync, the guard, the load or a repair, and see a test fail.

`make mutants` (python -m tests.mutants) applies each row of `tests/mutants/rows/` to a copy of src/ and tests/ and
runs the row's tests there. A mutant is killed when a test fails; one that survives is a hole in the tests. The unbroken
copy must pass all of these tests first. A row that doesn't find what it changes, once, is an error.
"""

import argparse
import ast
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tests.mutants.changes import NoTarget, definition
from tests.mutants.rows import MUTANTS
from tests.mutants.rows.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
KILLED = "killed"
VERDICTS = {0: "survived", 1: KILLED, 2: "interrupted or not collected", 4: "no such test", 5: "no test selected"}
"""By pytest's status."""
NOT_A_FAILURE = {
    "timeout": r"^E? *Failed: Timeout|did not finish within \d+ seconds",
    "broken: it doesn't even run": r"\b(NameError|UnboundLocalError|SyntaxError|ImportError|ModuleNotFoundError)\b",
}
"""What a run that failed for another reason than the mutation says, by verdict."""
END_SECONDS = 20
"""What a run gets to end its ranks once it is interrupted."""
_RUNNING: set[subprocess.Popen] = set()
"""Pytest runs in progress, each in a session of its own."""


class StaleRow(Exception):
    """A row doesn't fit the code any more; the message names it."""


@dataclass(frozen=True)
class Result:
    """How a mutant fared."""

    mutant: Mutant
    verdict: str
    seconds: float = 0.0
    first_failing: str = ""
    output: str = ""


def file_of(mutant: Mutant, root: Path) -> Path:
    """Where the mutant's module is."""
    base = root / "src" / mutant.where.partition(":")[0].replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def mutated(mutant: Mutant, root: Path) -> ast.Module:
    """The mutant's module with its change.

    Raises:
        StaleRow: The function, or what is to be changed in it, is not there once.
    """
    path = file_of(mutant, root)
    try:
        if not path.is_file():
            raise NoTarget(f"{path.relative_to(root)} is not there")
        module = ast.parse(path.read_text(encoding="utf-8"))
        mutant.change(definition(module, mutant.where.partition(":")[2]))
    except (NoTarget, SyntaxError) as error:
        raise StaleRow(
            f"mutant {mutant.name!r}: {mutant.where}: {error}: bring its row in tests/mutants/rows in line with the "
            "code"
        ) from error
    return module


def copy_repository(root: Path, to: Path) -> None:
    """What tests need, without what an earlier run left; the data stays where it is."""
    for folder in ("src", "tests"):
        shutil.copytree(root / folder, to / folder, ignore=shutil.ignore_patterns(".pytest_cache", "*.egg-info"))
    shutil.copy2(root / "pyproject.toml", to)
    for name in ("data", "scripts"):
        if (root / name).exists():
            (to / name).symlink_to(root / name)


def run_tests(copy: Path, tests: list[str], *, timeout_seconds: float) -> tuple[int | None, str]:
    """Pytest's status (None: it overran its time) and output, of tests in a copy, up to the first that fails."""
    scratch = copy / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--basetemp={scratch}/pytest", f"--timeout={timeout_seconds:g}", *tests]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {
        **kept,
        "PYTHONPATH": f"{copy}/src{os.pathsep}{copy}",
        "TMPDIR": str(scratch),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a file broken within a second and in place looks like the one compiled before
    }
    run = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _RUNNING.add(run)
    try:
        # Each test has the time limit too, and ends its ranks; this is for what hangs outside of tests.
        output, _ = run.communicate(timeout=timeout_seconds * 2)
        return run.returncode, output
    except subprocess.TimeoutExpired:
        return None, end(run)
    except KeyboardInterrupt:
        end(run)
        raise
    finally:
        _RUNNING.discard(run)


def end(run: subprocess.Popen) -> str:
    """Interrupt a run, so that it ends its ranks, then kill what is left of it; gives its output."""
    os.killpg(run.pid, signal.SIGINT)
    try:
        return run.communicate(timeout=END_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        return run.communicate()[0]


def judge(mutant: Mutant, base: Path, *, timeout_seconds: float) -> Result:
    """Apply one mutant to a copy of its own and run its tests."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant_", ignore_cleanup_errors=True) as folder:
        copy = Path(folder)
        copy_repository(base, copy)
        file_of(mutant, copy).write_text(
            ast.unparse(ast.fix_missing_locations(mutated(mutant, copy))), encoding="utf-8"
        )
        status, output = run_tests(copy, list(mutant.tests), timeout_seconds=timeout_seconds)
    verdict = "timeout" if status is None else VERDICTS.get(status, f"pytest ended with status {status}")
    failing = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.MULTILINE)
    if verdict == KILLED:
        verdict = next((why for why, text in NOT_A_FAILURE.items() if re.search(text, output, re.MULTILINE)), KILLED)
    return Result(mutant, verdict, time.monotonic() - started, failing[1] if failing else "", output)


def judge_all(mutants: list[Mutant], root: Path, *, jobs: int = 2, timeout_seconds: float = 120) -> list[Result]:
    """Run the tests on the unbroken copy, then on every mutant, `jobs` at a time, under a progress bar.

    Raises:
        StaleRow: A row doesn't fit the code, or its tests fail without it.
    """
    for mutant in mutants:
        mutated(mutant, root)
    with tempfile.TemporaryDirectory(prefix="unbroken_", ignore_cleanup_errors=True) as folder:
        base = Path(folder) / "base"
        base.mkdir()
        copy_repository(root, base)
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        with tqdm(total=len(mutants) + 1, unit="run", desc="the unbroken copy") as bar:
            status, output = run_tests(base, tests, timeout_seconds=timeout_seconds * 4)
            if status != 0:
                raise StaleRow(f"the tests don't pass on the code as it is:\n{output}")
            bar.update()
            bar.set_description("mutants")
            results = {}
            with ThreadPoolExecutor(jobs) as pool:
                running = [pool.submit(judge, mutant, base, timeout_seconds=timeout_seconds) for mutant in mutants]
                try:
                    for done in as_completed(running):
                        results[done.result().mutant] = done.result()
                        bar.update()
                except KeyboardInterrupt:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for run in tuple(_RUNNING):
                        os.killpg(run.pid, signal.SIGINT)
                    raise
    return [results[mutant] for mutant in mutants]


def table(results: list[Result]) -> str:
    """The results in columns."""
    rows = [("mutant", "what it breaks", "verdict", "seconds", "first failing test")]
    for result in results:
        mutant = result.mutant
        rows.append((mutant.name, mutant.breaks, result.verdict, f"{result.seconds:.0f}", result.first_failing))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    )


def main(arguments: list[str] | None = None, *, mutants: tuple[Mutant, ...] = MUTANTS, root: Path = ROOT) -> int:
    """Run, print, and return the status: 0 where every mutant was killed, 1 where one wasn't, 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("-k", dest="words", default="", help="only the mutants with these words in their names")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--timeout-seconds", type=float, default=120, help="of each test; a run gets twice that")
    parser.add_argument(
        "--output", action="store_true", help="print pytest's output of the mutants that weren't killed"
    )
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in mutants if options.words in mutant.name]
    if not chosen:
        print(
            f"error: -k {options.words!r}: none of the {len(mutants)} mutants has these words in its name: see them "
            "with python -m tests.mutants --list",
            file=sys.stderr,
        )
        return 2
    if options.list:
        print("\n".join(f"{mutant.name}: {mutant.breaks}" for mutant in chosen))
        return 0
    try:
        results = judge_all(chosen, root, jobs=options.jobs, timeout_seconds=options.timeout_seconds)
    except StaleRow as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table(results))
    left = [result for result in results if result.verdict != KILLED]
    if options.output:
        for result in left:
            print(f"\n{result.mutant.name}: {result.verdict}\n{result.output}")
    core = importlib.metadata.version("megatron-core")
    print(f"\n{len(results) - len(left)} of {len(results)} mutants killed on megatron-core {core}")
    return 1 if left else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the runs too
    sys.exit(main())
