# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""What runs beside what in an overlapped step: the host's Adam, and the passes of the main thread.

    python -m benchmarks.overlap_trace                     # the picture goes to docs/images
    python -m benchmarks.overlap_trace --plot build/overlap.png

All of the optimizer is on the host, with `overlap_cpu_optimizer_step`. The picture begins with the optimizer's step and
ends with the first forward pass after it: what the main thread does, layer by layer, what the optimizer's thread does,
and where the first waits for the second. On the simulated accelerator each thread takes a core, so this shows the order
of things, not the speed of a GPU.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks.figures import Figure, run
from benchmarks.training_step import UNCOUNTED, config, model_shape
from megatron.bridge.offload_engine.overlap.hybrid import Crossing
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils import device

ADAM, WAIT, STEP = "Adam on the host", "wait for the host", "optimizer.step()"
COLORS = {ADAM: "#c0392b", WAIT: "#d8d8d8", STEP: "#0b3c49", "forward": "#1f6f8b", "backward": "#8bb8c8"}


@dataclass
class Trace(Callback):
    """What began and ended when, in seconds, as (kind, name, start, end)."""

    spans: list[tuple[str, str, float, float]] = field(default_factory=list)
    step_starts: list[float] = field(default_factory=list)
    """When each call of the optimizer's step began."""

    def timed(self, kind: str, function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
        """The function, which also notes when it ran."""

        def with_span(*arguments: Any, **options: Any) -> Any:
            with self.span(kind, name):
                return function(*arguments, **options)

        return with_span

    @contextmanager
    def span(self, kind: str, name: str = "") -> Iterator[None]:
        """Note when the block ran."""
        started = time.perf_counter()
        yield
        self.spans.append((kind, name, started, time.perf_counter()))

    def on_train_start(self, context: CallbackContext) -> None:
        """Follow the passes of each layer and the optimizer's step."""
        for number, layer in enumerate(context.model[0].module.module.decoder.layers):
            layer.forward = self.timed("forward", layer.forward, str(number + 1))
        take = self.timed(STEP, context.optimizer.step)

        def step() -> Any:
            self.step_starts.append(time.perf_counter())
            return take()

        context.optimizer.step = step

    def of_step(self, number: int) -> tuple[float, list[tuple[str, str, float, float]]]:
        """When a step of the optimizer began, and all that began before the next one did."""
        start, end = self.step_starts[number : number + 2]
        spans = sorted((span for span in self.spans if start <= span[2] < end), key=lambda span: span[2])
        forward = [span for span in spans if span[0] == "forward"]
        last_layer = max(int(span[1]) for span in forward)
        for at, (_, name, _, ended) in enumerate(forward):
            if int(name) == last_layer:  # until the next pass, or the next step, runs the backward pass
                spans.append(("backward", "", ended, forward[at + 1][2] if at + 1 < len(forward) else end))
        return start, spans


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/overlap.png"))
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Trace a run, draw its step of median wait, and return how much of the host's time the main thread waited."""
    logging.disable(logging.INFO)
    device.enter_device()
    trace = traced(arguments)
    steps = [trace.of_step(number) for number in range(UNCOUNTED, len(trace.step_starts) - 1)]
    waited = tuple(_total(spans, WAIT) / _total(spans, ADAM) for _, spans in steps)
    start, spans = steps[waited.index(sorted(waited)[len(waited) // 2])]
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    draw(start, spans, arguments.plot)
    host = median(_total(spans, ADAM) for _, spans in steps)
    note = f"Adam takes {1e3 * host:.0f} ms of a step; a step without overlap waits for all of it"
    return [Figure("the main thread's wait, overlapped step", "the host's Adam", waited, 1.0, note=note)]


def _total(spans: list[tuple[str, str, float, float]], kind: str) -> float:
    return sum(end - start for of, _, start, end in spans if of == kind)


def traced(arguments: argparse.Namespace) -> Trace:
    """Run with overlapped steps on one rank, with all of the optimizer on the host."""
    trace = Trace()
    shape = model_shape(arguments.hidden_size, num_layers=arguments.num_layers)
    with tempfile.TemporaryDirectory() as directory:
        cfg = config(shape, arguments.seq_length, arguments.steps + UNCOUNTED, Path(directory), micro_batches=2)
        cfg.optimizer.optimizer_cpu_offload, cfg.optimizer.optimizer_offload_fraction = True, 1.0
        cfg.optimizer.overlap_cpu_optimizer_d2h_h2d = cfg.optimizer.overlap_cpu_optimizer_step = True
        with (
            patch.object(Crossing, "_step", _spanned(trace, ADAM, Crossing._step)),
            patch.object(Crossing, "arrive", _spanned(trace, WAIT, Crossing.arrive)),
        ):
            pretrain(cfg, forward_step, callbacks=[trace])
    return trace


def _spanned(trace: Trace, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def spanned(self: Crossing, *arguments: Any) -> Any:
        with trace.span(kind):
            return method(self, *arguments)

    return spanned


def draw(start: float, spans: list[tuple[str, str, float, float]], path: Path) -> None:
    """Draw one step, a row for each thread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.2), constrained_layout=True)
    last = max(end for kind, _, _, end in spans if kind == ADAM)
    first_pass = next(begun for kind, _, begun, _ in spans if kind == "backward")
    shown = 1.1 * (max(last, first_pass) - start)
    axes.set_xlim(0, 1e3 * shown)
    for kind, name, begun, ended in (span for span in spans if span[2] < start + shown):
        row = 0 if kind == ADAM else 1
        begun, ended = 1e3 * (begun - start), 1e3 * (ended - start)
        axes.barh(row, ended - begun, left=begun, color=COLORS[kind], edgecolor="white", linewidth=0.4, label=kind)
        if name:
            axes.text((begun + ended) / 2, row, name, ha="center", va="center", fontsize=6, color="white")
    axes.set_yticks([0, 1], ["optimizer's thread", "main thread"])
    axes.set_xlabel("ms after the optimizer's step began")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, fontsize=7, frameon=False, ncols=5, loc="outside upper center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(measure, build_parser())
