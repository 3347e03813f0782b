# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Writes docs/performance.md from the latest results of the benchmarks, which benchmarks/measured.json keeps."""

import json
import re
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import offload_prediction
from benchmarks.figures import Figure

ROOT = Path(__file__).parents[1]
DOCUMENT, MEASURED = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "measured.json"
PICTURES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class Benchmark:
    """A module of this package, and its title in the document."""

    name: str
    title: str
    picture: str = ""
    """A file in docs/images that the module draws; it has an option `--plot`."""


BENCHMARKS = (
    Benchmark("offload_sync", "Sync after a load"),
    Benchmark("checkpoint_speed", "Saving and loading"),
    Benchmark("training_step", "A training step, offload off"),
    Benchmark("optimizer_step", "A step of the offloaded optimizer"),
    Benchmark("offloaded_run", "Runs with offload and without"),
    Benchmark("overlap_trace", "What runs beside what", picture="overlap.png"),
    Benchmark("host_memory", "Host memory of the offloaded optimizer"),
    Benchmark("start_up", "Start-up"),
    Benchmark("hf_weights", "Hugging Face weights"),
    Benchmark("data", "Data"),
    Benchmark("scale", "Scale", picture="scale.png"),
)
"""All of them, in the document's order."""


@dataclass(frozen=True)
class Measured:
    """What one run of a benchmark gave."""

    about: str
    """What the benchmark does: the first paragraph of its docstring."""

    seconds: float
    date: str
    where: str
    """The machine and the versions."""

    figures: tuple[Figure, ...]


def read() -> dict[str, Measured]:
    """What was last measured, by the benchmark's name; nothing where the file isn't there."""
    if not MEASURED.exists():
        return {}
    kept = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {name: Measured(**{**one, "figures": as_figures(one["figures"])}) for name, one in kept.items()}


def write(measured: dict[str, Measured]) -> None:
    """Keep what was measured."""
    content = {name: asdict(one) for name, one in sorted(measured.items())}
    MEASURED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def as_figures(rows: list[dict]) -> tuple[Figure, ...]:
    """Figures from what `--json` writes."""
    return tuple(Figure(**{**row, "values": tuple(row["values"])}) for row in rows)


def is_missed(figure: Figure) -> bool:
    """Whether it doesn't reach what it must."""
    return not figure.median <= figure.at_most


def regressions(figures: tuple[Figure, ...]) -> list[str]:
    """A line for each figure that is beyond its limit, where noise is no excuse."""
    return [
        f"{figure.what}: {figure.spread()}, limit {figure.limit:g} {figure.unit}"
        for figure in figures
        if not figure.median <= figure.limit
    ]


def render(measured: dict[str, Measured]) -> str:
    """The document."""
    known = [benchmark for benchmark in BENCHMARKS if benchmark.name in measured]
    figures = [figure for benchmark in known for figure in measured[benchmark.name].figures]
    places = list(dict.fromkeys(measured[benchmark.name].where for benchmark in known))
    minutes = sum(measured[benchmark.name].seconds for benchmark in known) / 60
    parts = [
        HEAD.format(minutes=f"{minutes:.0f}"),
        "\n".join(f"- {place}" for place in places) + "\n",
        _summary(figures),
        *(_section(benchmark, measured[benchmark.name], several=len(places) > 1) for benchmark in known),
        offload_prediction.section(),
    ]
    return "".join(f"{_wrapped(line)}\n" for line in "\n".join(parts).splitlines())


def _wrapped(line: str) -> str:
    """A line of prose or of a list, at 120 columns; a table's row stays as it is, and code in one piece."""
    if line.startswith("|"):
        return line
    whole = re.sub(r"`[^`]+`", lambda code: code.group().replace(" ", "\0"), line)
    indent = "  " if line.startswith("- ") else ""
    wrapped = textwrap.fill(whole, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapped.replace("\0", " ")


HEAD = """\
<!-- Written by `make bench`: edit benchmarks/, not this file. -->
# Performance

```
make bench
```

repeats all of these measurements and writes this page ({minutes} minutes). Each benchmark times what it compares in \
turn, in one process, and takes the ratio of each turn. A figure is the median of the turns, with the smallest and the \
largest in parentheses. Smaller is better. `make bench` fails only if a median misses its aim by more than noise can \
explain (half as much again, unless its benchmark sets another limit). `make bench ARGS="--check"` measures without \
writing, and `make bench ARGS="--only start_up"` runs that benchmark alone. None of them ran on a GPU: \
[on a GPU](gpu.md) has figures from one, and [the last part](#offload-on-a-gpu-predicted) of this page predicts more.

Measured on
"""


def _summary(figures: list[Figure]) -> str:
    if not figures:
        return "nothing yet.\n"
    missed = [figure for figure in figures if is_missed(figure)]
    lines = [f"**{len(figures) - len(missed)} of {len(figures)} figures reach their aim.**"]
    if missed:
        lines.append(f"Missed: {'; '.join(figure.what for figure in missed)}. The notes below each table say why.")
    return " ".join(lines) + "\n"


def _section(benchmark: Benchmark, one: Measured, *, several: bool) -> str:
    place = f" on {one.where}" if several else ""
    lines = [
        f"## {benchmark.title}",
        "",
        one.about,
        "",
        f"`python -m benchmarks.{benchmark.name}`: {one.seconds:.0f} s, {one.date}{place}",
        "",
        "| what | against | measured | must reach | met |",
        "|---|---|---|---|---|",
        *map(_row, one.figures),
        "",
    ]
    notes = [_note(figure) for figure in one.figures if figure.note or is_missed(figure)]
    lines += [*notes, ""] if notes else []
    if benchmark.picture:
        lines += [f"![{benchmark.title}](images/{benchmark.picture})", ""]
    return "\n".join(lines)


def _row(figure: Figure) -> str:
    aim = f"{figure.at_most:g} {figure.unit}"
    cells = (figure.what, figure.against, figure.spread(), aim, "**no**" if is_missed(figure) else "yes")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _note(figure: Figure) -> str:
    parts = [f"missed by {figure.median / figure.at_most - 1:.0%}"] if is_missed(figure) else []
    parts += [figure.note] if figure.note else []
    return f"- {figure.what}: {': '.join(parts)}"
