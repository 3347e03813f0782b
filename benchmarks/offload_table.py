# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
r"""A step of a run for each fraction, mode and overlap, ours and stock Core's, with what the machine allows beside it.

    python -m benchmarks.offload_table
    python -m benchmarks.offload_table --num-layers 8 --hidden-size 2048 --seq-length 2048      # for a GPU

The runs are those of `benchmarks.offloaded_run`, one of each. Beside each figure is a note with three limits of its
step: the time that gradients and weights take over the link, the time that the host's Adam takes for the offloaded
part, and the time of a step without offload. If all three overlapped, a step would take the longest of them. The rates
are measured first, on one flat buffer in pinned memory. On the simulated accelerator the link is host memory.

Last come torch's own ways of offloading on the same model and batches (`torch_offload.py`): FSDP2's `CPUOffloadPolicy`,
and with `--torchao` torchao's `CPUOffloadOptimizer`, which needs a GPU.
"""

import argparse
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from benchmarks import offloaded_run
from benchmarks.figures import Figure, run
from benchmarks.offloaded_run import FRACTIONS, seconds_and_peak
from benchmarks.torch_offload import others, seconds_of_others
from benchmarks.training_step import VOCAB
from megatron.bridge.offload_engine.host_threads import plan_host_threads
from megatron.bridge.utils import device

GRADIENT_BYTES = 4
WEIGHT_BYTES = {False: 4, True: 2}
"""Of a parameter on its way to the device, by whether the mode is precision-aware."""


class Rates(NamedTuple):
    """What the machine can do in a second."""

    down: float
    """Bytes to the host."""
    up: float
    """Bytes to the device."""
    adam: float
    """Parameters that the host's Adam steps on."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = offloaded_run.build_parser()
    parser.description = __doc__.splitlines()[0]
    parser.set_defaults(rounds=1)
    parser.add_argument("--buffer-elements", type=int, default=1 << 24, help="on which the rates are measured")
    parser.add_argument("--torchao", action="store_true", help="also torchao's CPUOffloadOptimizer; needs CUDA")
    return parser


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """Each way of offloading against none, and against stock."""
    logging.disable(logging.INFO)
    device.enter_device()
    torchs_own = others(with_torchao=arguments.torchao)
    rates, figures = _rates(arguments.buffer_elements), []
    print(f"link {rates.down / 1e9:.1f} and {rates.up / 1e9:.1f} GB/s, host Adam {rates.adam / 1e9:.2f} G parameters/s")
    _, none = (seconds_and_peak(arguments, 0.0, "ours")[0] for _ in range(2))  # the first starts up
    seconds: dict[tuple[float, bool, bool], float] = {}
    for fraction in FRACTIONS:
        for aware in (False, True):
            for overlap in (False, True):
                ours, stock = (
                    seconds_and_peak(arguments, fraction, whose, aware=aware, overlap=overlap)[0]
                    for whose in ("ours", "stock")
                )
                offloaded = fraction * _num_parameters(arguments)
                link = offloaded * (GRADIENT_BYTES / rates.down + WEIGHT_BYTES[aware] / rates.up)
                mode = ("precision-aware" if aware else "FP32 shards") + (", overlap" if overlap else "")
                what = f"step of a run, fraction {fraction:g}, {mode}"
                note = (
                    f"{1e3 * ours:.0f} ms, stock {1e3 * stock:.0f} ms; limits: link {1e3 * link:.0f} ms, host "
                    f"{1e3 * offloaded / rates.adam:.0f} ms, without offload {1e3 * none:.0f} ms"
                )
                print(f"{what}: {note}", flush=True)
                seconds[fraction, aware, overlap] = ours
                figures.append(Figure(what, "without offload", (ours / none,), 1.5, note=note))
                figures.append(Figure(what, "stock Core, same options", (ours / stock,), 1.0))
    for name, torchs in seconds_of_others(arguments, torchs_own).items():
        what, note = "step of a run, fraction 1, FP32 shards, overlap", f"{1e3 * torchs:.0f} ms, a bare loop"
        print(f"{name}: {note}, {torchs / none:.2f}x of ours without offload", flush=True)
        figures.append(Figure(what, name, (seconds[1.0, False, True] / torchs,), 1.0, note=note))
    return figures


def _num_parameters(arguments: argparse.Namespace) -> int:
    """Of the model of `offloaded_run`: attention and a gated MLP of four times the width, embeddings tied."""
    hidden = arguments.hidden_size
    return VOCAB * hidden + arguments.num_layers * (4 + 3 * 4) * hidden * hidden


def _rates(elements: int) -> Rates:
    on_host = torch.zeros(elements, device="cpu", pin_memory=not device.is_simulated())
    on_device = torch.randn(elements, device=device.current_device())
    down = _seconds(lambda: on_host.copy_(on_device, non_blocking=True))
    up = _seconds(lambda: on_device.copy_(on_host, non_blocking=True))
    threads, before = plan_host_threads(None), torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads.count)
    try:
        master, master.grad = torch.zeros(elements, device="cpu"), on_host
        adam = _seconds(torch.optim.AdamW([master], fused=True).step)
    finally:
        torch.set_num_threads(before)
    return Rates(4 * elements / down, 4 * elements / up, elements / adam)


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The median; the first one isn't counted."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        device.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


if __name__ == "__main__":
    run(measure, build_parser())
