# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Run every benchmark, each in a process of its own, and write docs/performance.md.

    python -m benchmarks                          # make bench
    python -m benchmarks --only start_up          # measure this one alone; the document keeps the others
    python -m benchmarks --check                  # measure, write nothing

Ends with status 1 if a benchmark fails or a figure is beyond its limit. If a benchmark fails, the document keeps its
previous figures.
"""

import argparse
import ast
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks import document
from benchmarks.document import BENCHMARKS, ROOT, Benchmark, Measured

NAMES = [benchmark.name for benchmark in BENCHMARKS]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--check", action="store_true", help="measure without writing anything")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each benchmark (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, and say what is wrong.

    Returns:
        The exit status: 0, or 1 where a benchmark failed or a figure is beyond its limit.
    """
    arguments = build_parser().parse_args(argv)
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in (arguments.only or NAMES)]
    with tempfile.TemporaryDirectory() as unused:
        pictures = Path(unused) if arguments.check else document.PICTURES
        measured, problems = measure_all(chosen, timeout_seconds=arguments.timeout, pictures=pictures)
    if measured and not arguments.check:
        measured = document.read() | measured
        document.write(measured)
        document.DOCUMENT.write_text(document.render(measured), encoding="utf-8")
        print(f"written: {document.DOCUMENT.relative_to(ROOT)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def measure_all(
    chosen: Sequence[Benchmark],
    *,
    timeout_seconds: float,
    pictures: Path,
    package: str = "benchmarks",
    where: str | None = None,
) -> tuple[dict[str, Measured], list[str]]:
    """Run benchmarks one after the other.

    Args:
        chosen: Which.
        timeout_seconds: For each; then it and all that it started are ended.
        pictures: Where they draw.
        package: Where their modules are.
        where: The machine and the versions; None asks this one.

    Returns:
        What those that succeeded measured, by name, and a line for each that failed and each figure beyond its limit.
    """
    where = _where() if where is None else where
    measured, problems = {}, []
    for number, benchmark in enumerate(chosen, start=1):
        print(f"{number}/{len(chosen)} {benchmark.name}", end=" ", flush=True)
        started = time.monotonic()
        options = ["--plot", str(pictures / benchmark.picture)] if benchmark.picture else []
        figures, error = _run([f"{package}.{benchmark.name}", *options], timeout_seconds)
        seconds = time.monotonic() - started
        if error:
            print(f"{seconds:.0f} s, failed", flush=True)
            problems.append(f"{benchmark.name} failed: {error}")
            continue
        missed = sum(map(document.is_missed, figures))
        print(f"{seconds:.0f} s, {len(figures)} figures, {missed} of them missed", flush=True)
        problems += [f"{benchmark.name}: {line}" for line in document.regressions(figures)]
        about = about_of(f"{package}.{benchmark.name}")
        date = datetime.date.today().isoformat()
        measured[benchmark.name] = Measured(about, round(seconds, 1), date, where, figures)
    return measured, problems


def about_of(module: str) -> str:
    """The first paragraph of a module's docstring, on one line; the module isn't imported."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source))
    return " ".join(text.split("\n\n")[0].split())


def _run(command: list[str], timeout_seconds: float) -> tuple[tuple[document.Figure, ...], str]:
    """A benchmark's figures, or none and why."""
    with tempfile.TemporaryDirectory() as directory:
        figures, log = Path(directory, "figures.json"), Path(directory, "log")
        command = [sys.executable, "-W", "ignore", "-m", *command, "--json", str(figures)]
        with log.open("wb") as output:
            # A session of its own, so that ranks that it leaves behind can be ended with it.
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status == 0:
            return document.as_figures(json.loads(figures.read_text(encoding="utf-8"))), ""
        why = f"no end after {timeout_seconds:.0f} s" if status is None else f"exit status {status}"
        return (), f"{why}\n{log.read_text(encoding='utf-8', errors='replace')[-4000:]}"


def _where() -> str:
    """The machine and the versions, in a line."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "megatron-core", "transformers"))
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    load = os.getloadavg()[0]
    beside = f"; other work beside it, load average {load:.0f}" if load > 1 else ""
    return (
        f"{os.cpu_count()} cores ({cpu}), {gibibytes:.0f} GiB, {_accelerator()}; Python {platform.python_version()}, "
        f"{versions}; OMP_NUM_THREADS={threads}{beside}"
    )


def _accelerator() -> str:
    """The GPU's name, asked in a process of its own: this one holds none while others are measured."""
    command = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    asked = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120, check=True)
    return asked.stdout.strip() or "no GPU: simulated accelerator"


if __name__ == "__main__":
    raise SystemExit(main())
