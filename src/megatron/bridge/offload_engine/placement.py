# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which part of the optimizer stays on the device, is streamed through it, or is stepped on by the host.

The choice is the one with the shortest predicted step among those that fit the memory. The step's forward and backward
passes are the same for all, so only the optimizer's own time is compared.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron.bridge.offload_engine.ceilings import Ceilings
from megatron.bridge.offload_engine.step import BUCKET_ELEMENTS
from megatron.bridge.offload_engine.streamed_state import KINDS, NUM_BUFFERS, PIECE_ELEMENTS

FP32 = 4
"""Bytes."""

HUNDREDTHS = range(0, 101, 2)
"""The fractions that are compared."""

AS_GOOD = 1.05
"""Of placements whose predictions differ by less, the one that moves least is chosen."""


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
    """What one rank's optimizer is."""

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


EVERY_PLACEMENT = tuple(
    Placement(fraction / 100, streamed / 100)
    for fraction in HUNDREDTHS
    for streamed in (HUNDREDTHS if fraction else (0,))
)
"""Ordered by what is moved."""


def device_bytes(demand: Demand, placement: Placement) -> float:
    """Device memory that the optimizer's state takes, buffers included."""
    offloaded = placement.fraction * demand.elements
    resident = demand.elements - offloaded
    with_shard = resident if demand.is_precision_aware else demand.elements
    per_shard = FP32 if demand.gradients_are_fp32 else 2 * FP32
    piece = min(PIECE_ELEMENTS, placement.streamed * offloaded)
    buffers = demand.num_hybrids * NUM_BUFFERS * len(KINDS) * FP32 * piece
    return with_shard * per_shard + resident * 2 * FP32 + buffers


def predict_seconds(ceilings: Ceilings, demand: Demand, placement: Placement) -> float:
    """How long the optimizer takes in a step, from the last gradient to the last weight.

    The link, the host's Adam and the device's work at the same time, so the slowest decides. To that comes what nothing
    can overlap with: the first bucket on its way down, and the last on its way back.
    """
    offloaded = placement.fraction * demand.elements
    streamed = min(offloaded, math.ceil(placement.streamed * offloaded / BUCKET_ELEMENTS) * BUCKET_ELEMENTS)
    by_host = offloaded - streamed
    bucket, piece = min(BUCKET_ELEMENTS, by_host), min(PIECE_ELEMENTS, streamed)
    one_way = FP32 * by_host + len(KINDS) * FP32 * streamed
    link = max(one_way / ceilings.to_host, one_way / ceilings.to_device, 2 * one_way / ceilings.both_ways)
    last = FP32 * bucket / ceilings.to_device + bucket / ceilings.host_adam
    last = max(last, len(KINDS) * FP32 * piece / ceilings.to_host)
    alone = FP32 * (bucket if demand.overlaps else by_host)
    host = by_host / ceilings.host_adam + alone / ceilings.to_host + alone / ceilings.to_device
    return max(host, link + last, (demand.elements - by_host) / ceilings.device_adam)


@dataclass(frozen=True)
class Choice:
    """A placement for all ranks, and what is expected of it."""

    placement: Placement
    seconds: float
    """Of the optimizer in a step, on the slowest rank."""
    device_bytes: float
    """Of its state, on the rank with the most."""
    fits: bool
    """Whether every rank has that much."""


def choose(
    ceilings: Ceilings, demands: Sequence[Demand], among: Iterable[Placement] = EVERY_PLACEMENT, slack_bytes: float = 0
) -> Choice:
    """The first placement with about the shortest predicted step that fits all ranks; if none fits, the smallest.

    Args:
        ceilings: Of the slowest rank.
        demands: Of each rank.
        among: The placements to compare.
        slack_bytes: By how much a rank may need more than it has.
    """
    demands = sorted(set(demands), key=lambda demand: (demand.elements, demand.free_bytes))
    choices = [
        Choice(
            placement,
            max(predict_seconds(ceilings, demand, placement) for demand in demands),
            max(device_bytes(demand, placement) for demand in demands),
            all(device_bytes(demand, placement) <= demand.free_bytes + slack_bytes for demand in demands),
        )
        for placement in among
    ]
    fitting = [choice for choice in choices if choice.fits]
    if fitting:
        shortest = min(choice.seconds for choice in fitting)
        return next(choice for choice in fitting if choice.seconds <= AS_GOOD * shortest)
    return min(choices, key=lambda choice: (choice.device_bytes, choice.seconds))
