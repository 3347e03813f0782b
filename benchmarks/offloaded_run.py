# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""A step of a whole run with half and with all of the optimizer on the host, against the run without offload.

    python -m benchmarks.offloaded_run
    python -m benchmarks.offloaded_run --num-layers 16 --hidden-size 2048 --seq-length 2048      # for a GPU

Our runs and those of stock Core's optimizer take turns in one process, round after round. A round's figure is the
median of its steps. Gradients are summed over several micro-batches, as where memory is short. On a GPU the peak of its
memory is compared too. On the simulated accelerator both optimizers step in host memory, so the ratio shows only what
offload costs apart from the link and the slower Adam.
"""

import argparse
import gc
import logging
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.figures import Figure, ratios, run
from benchmarks.packing import Clock
from benchmarks.training_step import UNCOUNTED, config, model_shape
from megatron.bridge.core_repairs import install
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils import device

FRACTIONS = (0.5, 1.0)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=4, help="whose gradients a step sums")
    parser.add_argument("--steps", type=int, default=3, help="of each run and round")
    parser.add_argument("--rounds", type=int, default=4)
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Each fraction against none, and against stock."""
    logging.disable(logging.INFO)
    device.enter_device()
    cases = [(0.0, "ours"), *((fraction, whose) for fraction in FRACTIONS for whose in ("ours", "stock"))]
    rounds = [{case: seconds_and_peak(arguments, *case) for case in cases} for _ in range(arguments.rounds + 1)][1:]
    seconds = {case: tuple(each[case][0] for each in rounds) for case in cases}
    peaks = {case: tuple(float(each[case][1]) for each in rounds) for case in cases}
    none, figures = seconds[0.0, "ours"], []
    for fraction in FRACTIONS:
        ours, stock = (seconds[fraction, whose] for whose in ("ours", "stock"))
        what = f"step of a run, fraction {fraction:g}"
        note = f"{1e3 * median(ours):.0f} ms; stock {median(ratios(stock, none)):.2f}x of the run without offload"
        figures.append(Figure(what, "without offload", ratios(ours, none), 1.5, note=note))
        figures.append(Figure(what, "stock Core, same fraction", ratios(ours, stock), 1.0))
        if not device.is_simulated():
            held = ratios(peaks[fraction, "ours"], peaks[0.0, "ours"])
            what, note = f"peak device memory, fraction {fraction:g}", f"{median(peaks[fraction, 'ours']) / 1e6:.0f} MB"
            figures.append(Figure(what, "without offload", held, 1.0, note=note))
    return figures


def seconds_and_peak(
    arguments: argparse.Namespace, fraction: float, whose: str, *, aware: bool = False, overlap: bool = True
) -> tuple[float, int]:
    """Seconds of a step, and the peak of the device's memory in bytes (0 where it is simulated)."""
    clock, ours = Clock(), install.REPAIRS
    shape = model_shape(arguments.hidden_size, num_layers=arguments.num_layers)
    steps = arguments.steps + UNCOUNTED
    with tempfile.TemporaryDirectory() as directory:
        cfg = config(shape, arguments.seq_length, steps, Path(directory), micro_batches=arguments.micro_batches)
        cfg.optimizer.optimizer_cpu_offload = fraction > 0
        cfg.optimizer.optimizer_offload_fraction = fraction
        cfg.optimizer.overlap_cpu_optimizer_d2h_h2d = overlap and fraction > 0
        cfg.optimizer.use_precision_aware_optimizer = aware
        gc.collect()
        if not device.is_simulated():
            torch.accelerator.reset_peak_memory_stats()
        install.REPAIRS = ours if whose == "ours" else ()
        try:
            pretrain(cfg, forward_step, callbacks=[clock])
        finally:
            install.REPAIRS = ours
    return median(clock.seconds[UNCOUNTED:]), 0 if device.is_simulated() else device.peak_memory_bytes()


if __name__ == "__main__":
    run(measure, build_parser())
