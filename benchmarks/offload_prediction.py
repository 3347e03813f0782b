# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What an offloaded step should take on a GPU: the planner's prediction, fed with ceilings that were measured there.

    python -m benchmarks.offload_prediction        # prints its part of docs/performance.md

Measures nothing. The function that chooses a placement in a run (`offload_engine/prediction.py`) is compared with steps
that were measured, and then asked about others.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

from benchmarks.gpu_model import (
    ASSUMED_FLOPS,
    COPIES,
    IN_A_ROW,
    ROUNDED,
    STEPS,
    Machine,
    Shape,
    Way,
    of_8b,
    read_machine,
)
from megatron.bridge.offload_engine.placement import EVERY_PLACEMENT, choose
from megatron.bridge.offload_engine.prediction import Placement, Reckoning, reckon

FREE = 1.1
"""Times the step without offload."""


HEAD = """\
## Offload on a GPU, predicted

Nothing above ran on a GPU. This part is a prediction, by the function with which a run [chooses its \
placement](training/cpu-offload.md#placement-by-the-run) (`prediction.py`), from the ceilings of a machine that was \
measured: {card}, {date} ([on a GPU](gpu.md#the-machines-ceilings); {software}, commit `{commit}`).

`python -m benchmarks.offload_prediction` prints it.

| way | options of `optimizer` | what runs beside what |
|---|---|---|
| in a row | | nothing: all gradients go down, Adam steps on the host, all weights go up |
| copies overlap | `overlap_cpu_optimizer_d2h_h2d` | both copies, Adam on the host, and Adam on the device for what \
stays there |
| steps overlap | `overlap_cpu_optimizer_step` | also: Adam on the host and the way up, beside the forward pass of the \
next step's first micro-batch; the way down, beside the backward pass of the last micro-batch if gradients cross there |
| streamed | `optimizer_streamed_fraction` | masters and moments on their way up and down, Adam on the device |

Clipping needs the norm of all gradients, so Adam never starts before the backward pass has ended.

### How good the prediction is

What goes in:

- {machine}
- without copies beside it, Adam on the host steps on {alone:.2f} G parameters/s; the host rounds {rounding:.1f}
- a step without offload takes {compute:.0f} ms beside its optimizer. Of the optimizer's time {other:.0f} ms are the \
same in every row: norm, clipping, rounding on the device, launches

One number is fitted. Copies share the host's memory with Adam, which keeps {share:.2f} of its speed beside them: the \
median of what the four rows with overlapping copies show. A run that chooses its placement measures it. Rows in a row \
use nothing fitted.
"""

BETWEEN = """\
The optimizer's own time is met within 5%. So copies do run from pinned memory, 4 bytes a parameter each way, in both \
modes, and threads and buckets add nothing that can be seen. Whole steps are off by more, because their other part \
varied: it should take {compute} ms in each row, and took {rest} ms. We don't know why. It is launched by one thread \
of the host, so it may depend on what else that machine did.

The day before, the same commit ran without a synchronisation around the optimizer, and only its ratios were kept: \
{all_measured} of no offload at fraction 1 and {half_measured} at 0.5, with overlapping copies. On the second day \
they were {all_later} and {half_later}, and the prediction is {all_predicted} and {half_predicted}. What the \
prediction adds to a step would give {all_fitted} and {half_fitted} if that day's step without offload had taken \
{fitted} ms instead of {without}. So one unknown denominator, of which we have no record, would explain both.

### What it predicts

"Optimizer adds" is what is left once all that runs beside something else is taken once. The last row of each part is \
the fastest placement with all of the state on the host.
"""

FOOT = """\
The model of 8 billion parameters is on one rank. Its passes are taken to run at {flops:.0f} TFLOP/s, about 40% of the \
card's peak, which is assumed. A forward pass is taken for a third of a micro-batch's time. No row with overlapping \
steps or streamed state was measured yet.

### When offload is free, and when not

**Offload is free when a step has enough tokens.** The optimizer costs the same for any number of tokens, and Adam on \
the host is what takes longest, except with streamed state, where it is the link. The table gives the tokens a GPU and \
step from which a step with all of the optimizer offloaded takes at most 1.1 times as long as one without. It is for \
the model above with 8 billion parameters; with fewer or more, the numbers hardly change.
"""

RULE = """\
- **Rule of thumb.** Offload costs less than a tenth if a GPU's tokens in a step are more than 1.7 times its FLOP/s \
divided by the parameters that its share of the host steps on in a second. At 400 TFLOP/s and 3.4 G parameters/s, that \
is 200,000 tokens. It pays to collect them over micro-batches; they needn't be in memory at once.
- **Threads.** With one thread, which is what torchrun sets, Adam takes six times as long as with 16. Ranks on one \
machine share its cores and its memory, so count the threads of one rank.
- **Link.** At 55 GB/s it isn't what limits the host's Adam. At a quarter of that it is, as with pageable memory. \
Streamed state moves three times as much, and pays where a rank has few threads.
- **Overlapping steps** hide at most one forward pass of one micro-batch. They help most if a step has few large \
micro-batches; the table has the best case, a single one. Rounding on the host, as they do in precision-aware mode, \
saves bytes on a link that isn't the limit and costs the host a third more: by this reckoning it doesn't pay here.
- **Not free:** few tokens a step (fewer than 40,000 a GPU, even with 16 threads), or one thread without streamed \
state. Offload the smallest fraction that fits.
- At the shape that was measured, 1.1x at fraction 1 is out of reach for this machine: the host's Adam alone needs \
nearly as long as all forward and backward passes.
"""


def section() -> str:
    """A part of docs/performance.md."""
    machine = read_machine()
    measured, ceilings = machine.measured, machine.ceilings
    parts = [
        HEAD.format(
            **measured,
            machine=ceilings,
            alone=ceilings.host_adam_alone / 1e9,
            rounding=ceilings.host_rounding / 1e9,
            share=machine.beside_copies,
            elements=machine.elements / 1e6,
            compute=1e3 * machine.compute_seconds,
            other=1e3 * machine.other_seconds(machine.elements),
        ),
        *_compared(machine),
        BETWEEN.format(**_of_the_day_before(machine)),
        *_predicted(machine),
        FOOT.format(flops=ASSUMED_FLOPS / 1e12),
        *_when_free(machine),
        RULE,
    ]
    return "\n".join(parts)


def _compared(machine: Machine) -> Iterator[str]:
    yield "| fraction | mode | way | optimizer: predicted | measured | off by | step: predicted | measured | off by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for step in machine.measured["steps"]:
        way, placement = COPIES if step["overlap"] else IN_A_ROW, Placement(step["fraction"], 0.0)
        shape = machine.shape()
        whole = 1e3 * machine.step_seconds(shape, way, placement)
        optimizer = whole - 1e3 * shape.compute_seconds
        cells = [
            *(f"{step['fraction']:g}", "precision-aware" if step["aware"] else "FP32 shards", way.name),
            *(f"{optimizer:.0f} ms", f"{step['optimizer_ms']:.0f} ms", _off(optimizer, step["optimizer_ms"])),
            *(f"{whole:.0f} ms", f"{step['step_ms']:.0f} ms", _off(whole, step["step_ms"])),
        ]
        yield _row(cells)
    yield ""


def _of_the_day_before(machine: Machine) -> dict[str, str]:
    """The ratios of the run that printed no milliseconds, and the one denominator that would explain both."""
    shape, ratios, words = machine.shape(), machine.measured["ratios"], {}
    without = machine.step_seconds(shape, IN_A_ROW, Placement(0.0, 0.0))
    adds = {key: machine.step_seconds(shape, COPIES, Placement(float(key), 0.0)) - without for key in ratios}
    fitted = median(adds[key] / (ratios[key] - 1) for key in ratios)
    for name, key in (("all", "1"), ("half", "0.5")):
        words[f"{name}_measured"] = f"{ratios[key]:.2f}x"
        words[f"{name}_predicted"] = f"{1 + adds[key] / without:.2f}x"
        words[f"{name}_fitted"] = f"{1 + adds[key] / fitted:.2f}x"
        on_the_day = [one for one in machine.measured["steps"] if one["fraction"] == float(key) and one["overlap"]]
        step_ms = next(one["step_ms"] for one in on_the_day if not one["aware"])
        words[f"{name}_later"] = f"{step_ms / machine.measured['without_offload']['step_ms']:.2f}x"
    rest = [one["step_ms"] - one["optimizer_ms"] for one in machine.measured["steps"]]
    return {
        **words,
        "fitted": f"{1e3 * fitted:.0f}",
        "without": f"{1e3 * without:.0f}",
        "rest": f"{min(rest):.0f} to {max(rest):.0f}",
        "compute": f"{1e3 * shape.compute_seconds:.0f}",
    }


def _predicted(machine: Machine) -> Iterator[str]:
    yield _row(
        [
            *("fraction", "way", "GB down", "GB up", "link down, up", "host", "device"),
            *("optimizer adds", "step", "of no offload"),
        ]
    )
    yield "|---" * 10 + "|"
    for shape in (machine.shape(), machine.shape(4), of_8b(8192, 1), of_8b(16 * 8192, 16)):
        compute, other = shape.compute_seconds, machine.other_seconds(shape.elements)
        yield _row([f"**{shape.name}**: compute {_time(compute)}, other {_time(other)}", *[""] * 9])
        for way, placement, name in _cases(machine, shape):
            parts = reckon(machine.ceilings, way.demand(shape), placement)
            step = machine.step_seconds(shape, way, placement)
            ratio = machine.ratio(shape, way, placement)
            yield _row([f"{placement.fraction:g}", name, *_cells(parts), _time(step), f"{ratio:.2f}x"])
    yield ""


def _cases(machine: Machine, shape: Shape) -> Iterator[tuple[Way, Placement, str]]:
    yield IN_A_ROW, Placement(0.0, 0.0), "not offloaded"
    for way in (IN_A_ROW, COPIES, STEPS):
        yield way, Placement(0.5, 0.0), way.name
    for way in (IN_A_ROW, COPIES, STEPS, ROUNDED):
        yield way, Placement(1.0, 0.0), way.name
    yield COPIES, Placement(1.0, 1.0), "streamed"
    whole = [placement for placement in EVERY_PLACEMENT if placement.fraction == 1]
    best = choose(machine.ceilings, [COPIES.demand(shape)], whole).placement
    yield COPIES, best, f"{best.streamed:.0%} streamed, copies overlap"


def _cells(parts: Reckoning) -> list[str]:
    return [
        *(f"{parts.bytes_down / 1e9:.1f}", f"{parts.bytes_up / 1e9:.1f}"),
        f"{_time(parts.down_seconds)}, {_time(parts.up_seconds)}",
        *(_time(parts.host_seconds), _time(parts.device_seconds), _time(parts.seconds)),
    ]


def _when_free(machine: Machine) -> Iterator[str]:
    ways: list[tuple[str, Way, Placement]] = [
        ("copies overlap", COPIES, Placement(1.0, 0.0)),
        ("steps overlap, 1 micro-batch", STEPS, Placement(1.0, 0.0)),
        ("streamed", COPIES, Placement(1.0, 1.0)),
    ]
    yield _row(["threads of the host", "G parameters/s", *(name for name, _, _ in ways)])
    yield "|---" * (2 + len(ways)) + "|"
    for threads, rate in machine.measured["host_adam_by_threads"].items():
        there = Machine(machine.measured)
        there.ceilings = replace(machine.ceilings, host_adam_alone=rate, host_adam=machine.beside_copies * rate)
        tokens = [_fewest_tokens(partial(_ratio, there, way, where)) for _, way, where in ways]
        yield _row([threads, f"{rate / 1e9:.2f}", *(f"{count / 1e3:.0f}k" for count in tokens)])
    yield ""


def _ratio(machine: Machine, way: Way, placement: Placement, tokens: int) -> float:
    return machine.ratio(of_8b(tokens, 1), way, placement)


def _fewest_tokens(ratio: Callable[[int], float]) -> int:
    """In thousands, from which a step is at most `FREE` times the one without offload."""
    low, high = 0, 1 << 12
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(1000 * middle) <= FREE else (middle, high)
    return 1000 * high


def _time(seconds: float) -> str:
    if not seconds:
        return "0"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def _off(predicted: float, measured: float) -> str:
    return f"{round(100 * (predicted / measured - 1)):+d}%"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(section())
