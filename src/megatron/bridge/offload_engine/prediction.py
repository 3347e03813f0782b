# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How long an offloaded optimizer takes in a step, reckoned from what the machine can do: what moves, and beside what.

One step, with what may run beside what in brackets:

    gradients to the host   [beside the end of the backward pass]  [beside Adam on the host]
    Adam on the host        [beside the copies]  [beside the next forward pass]
    weights to the device   [beside Adam on the host]  [beside the next forward pass]
    streamed state          up, Adam on the device, down: [all three beside each other and beside the host]
    what stays              Adam on the device  [beside all of the host's]

The planner (`placement.py`) compares placements by it, and docs/performance.md shows it for a machine that was
measured.
"""

import math
from dataclasses import dataclass, replace

from megatron.bridge.offload_engine.ceilings import Ceilings
from megatron.bridge.offload_engine.step import BUCKET_ELEMENTS
from megatron.bridge.offload_engine.streamed_state import KINDS, PIECE_ELEMENTS

FP32 = 4
"""Bytes."""

STREAMED_BYTES = len(KINDS) * FP32
"""Of a streamed parameter, each way."""


@dataclass(frozen=True)
class Placement:
    """Where the optimizer's state lives, and which side steps on it."""

    fraction: float
    """Of the optimizer, whose state is on the host: `optimizer_offload_fraction`."""
    streamed: float
    """Of that, what the device steps on: `optimizer_streamed_fraction`."""

    def __str__(self) -> str:
        return f"optimizer_offload_fraction={self.fraction:g}, optimizer_streamed_fraction={self.streamed:g}"


@dataclass(frozen=True)
class Demand:
    """What one rank's optimizer is, and what it may run beside."""

    elements: int
    """Parameters that the rank steps on."""
    free_bytes: float
    """Device memory for its state, with all else accounted for."""
    is_precision_aware: bool = False
    """Whether the offloaded part needs no FP32 shard on the device."""
    gradients_are_fp32: bool = True
    """Otherwise each shard on the device has an FP32 copy of its gradient."""
    overlaps: bool = False
    """Whether copies of what the host steps on overlap with its steps."""
    num_hybrids: int = 1
    """Optimizers with buffers of their own: a model with experts has two."""
    gradient_bytes: int = FP32
    """Of a parameter's gradient on its way to the host."""
    weight_bytes: int = FP32
    """Of a parameter on its way to the device: 2 where the host rounds it, which takes the host's time."""
    forward_seconds: float = 0.0
    """Of a micro-batch's forward pass, beside which the host may step; 0 where the step waits for the host."""
    backward_seconds: float = 0.0
    """Of the last micro-batch's backward pass, beside which gradients may cross; 0 where they cross after it."""


@dataclass(frozen=True)
class Reckoning:
    """What the optimizer does in a step, and how long each part would take alone."""

    bytes_down: float
    bytes_up: float
    down_seconds: float
    """Of the link, to the host, with nothing in the other direction."""
    up_seconds: float
    host_seconds: float
    """Of Adam on the host, and of rounding there."""
    device_seconds: float
    """Of Adam on the device: what stays there, and what is streamed through it."""
    seconds: float
    """By how much the optimizer makes the step longer, with what runs beside each other taken once."""


def predict_seconds(ceilings: Ceilings, demand: Demand, placement: Placement) -> float:
    """By how much the optimizer makes a step longer."""
    return reckon(ceilings, demand, placement).seconds


def reckon(ceilings: Ceilings, demand: Demand, placement: Placement) -> Reckoning:
    """What the optimizer does in a step, and how much of it isn't hidden.

    The link, the host's Adam and the device's work at the same time, so the slowest decides. To that comes what nothing
    can overlap with: the first bucket on its way down, and the last on its way back. Without overlap (`overlaps`) the
    host's part is three phases in a row, and no copies slow its Adam down.
    """
    offloaded = placement.fraction * demand.elements
    streamed = min(offloaded, math.ceil(placement.streamed * offloaded / BUCKET_ELEMENTS) * BUCKET_ELEMENTS)
    by_host = offloaded - streamed
    down = demand.gradient_bytes * by_host + STREAMED_BYTES * streamed
    up = demand.weight_bytes * by_host + STREAMED_BYTES * streamed
    host = by_host / (ceilings.host_adam if demand.overlaps else ceilings.host_adam_alone)
    if demand.weight_bytes < FP32:
        host += by_host / ceilings.host_rounding
    device = (demand.elements - by_host) / ceilings.device_adam
    alone = Reckoning(down, up, down / ceilings.to_host, up / ceilings.to_device, host, device, 0.0)
    of_the_host = _of_the_host(ceilings, demand, by_host, alone)
    of_the_link = _of_the_link(ceilings, by_host, streamed, alone) - demand.backward_seconds - demand.forward_seconds
    return replace(alone, seconds=max(of_the_host, of_the_link, device))


def _of_the_host(ceilings: Ceilings, demand: Demand, by_host: float, alone: Reckoning) -> float:
    """Until the host's last weight is on the device, less what the passes before and after hide."""
    if not by_host:
        return 0.0
    part = min(BUCKET_ELEMENTS / by_host, 1.0)  # the first bucket down, and the last one up
    down = demand.gradient_bytes * by_host / ceilings.to_host
    up = demand.weight_bytes * by_host / ceilings.to_device
    if not demand.overlaps:
        return down + alone.host_seconds + up
    # All gradients are on the host before the next forward pass begins; the norm of all comes before the first Adam.
    arrives = max(part * down, down - demand.backward_seconds)
    hidden = (1 - part) * demand.forward_seconds  # the last layers need what is stepped on last
    return max(arrives, part * (down + up) + alone.host_seconds - hidden)


def _of_the_link(ceilings: Ceilings, by_host: float, streamed: float, alone: Reckoning) -> float:
    """Until all is over the link, and the last bucket or piece has been stepped on."""
    both_ways = (alone.bytes_down + alone.bytes_up) / ceilings.both_ways
    bucket = min(BUCKET_ELEMENTS, by_host)
    last = bucket * alone.host_seconds / by_host + FP32 * bucket / ceilings.to_device if by_host else 0.0
    last = max(last, STREAMED_BYTES * min(PIECE_ELEMENTS, streamed) / ceilings.to_host)
    return max(alone.down_seconds, alone.up_seconds, both_ways) + last
