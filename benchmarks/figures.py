# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark measures and prints: figures, each with a reference and an aim.

A benchmark is a module with `measure(arguments) -> list[Figure]` and `build_parser()`. `benchmarks/__main__.py` runs
all of them, each in processes of its own, and writes docs/performance.md. Machines are noisy, so what is compared is
timed in turn, in one process, and the ratio of each turn counts, not the ratio of two medians.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured row. Smaller is better, always."""

    what: str
    """What is measured: "sync after a load, precision-aware"."""

    against: str
    """What it is measured against; empty where the figure is no ratio."""

    values: tuple[float, ...]
    """Of each repeat: ours / the other's, or seconds, or whatever `unit` says."""

    at_most: float
    """What the median must reach."""

    unit: str = "x"
    """"x" for a ratio, else "s", "MB", …"""

    fails_above: float = 0.0
    """Above it a regression is certain, whatever the noise: `make bench` fails. Default: 1.5 times `at_most`."""

    note: str = ""
    """What a reader must know: sizes, and, where `at_most` is missed, why."""

    @property
    def median(self) -> float:
        """Of the values."""
        return median(self.values)

    @property
    def limit(self) -> float:
        """Above this median `make bench` fails."""
        return self.fails_above or 1.5 * self.at_most

    def spread(self) -> str:
        """The median, and the smallest and the largest."""
        return f"{self.median:.3g} {self.unit} ({min(self.values):.3g} to {max(self.values):.3g})"


def interleaved(rows: dict[str, Callable[[], Any]], repeats: int, *, settle: Callable[[], None] = os.sync) -> dict:
    """Seconds of each row: each repeat takes all rows in turn. A first repeat isn't counted.

    Args:
        rows: What to time, by name. Work on an accelerator must end in a synchronisation.
        repeats: How often.
        settle: Called before each: default writes back what the one before has written.
    """
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats + 1):
        for name, work in rows.items():
            settle()
            started = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - started)
    return {name: tuple(seconds[1:]) for name, seconds in taken.items()}


def ratios(ours: tuple[float, ...], others: tuple[float, ...]) -> tuple[float, ...]:
    """Ours / the other's, turn by turn."""
    return tuple(mine / other for mine, other in zip(ours, others, strict=True))


def run(measure: Callable[[argparse.Namespace], list[Figure]], parser: argparse.ArgumentParser) -> None:
    """A benchmark's command line: measure, print a table; with `--json FILE`, write the figures there too."""
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file, too")
    arguments = parser.parse_args()
    figures = measure(arguments)
    print("what | against | measured | must reach")
    for figure in figures:
        print(f"{figure.what} | {figure.against} | {figure.spread()} | {figure.at_most:g} {figure.unit}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1), encoding="utf-8")
