# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which part of the optimizer stays on the device, is streamed through it, or is stepped on by the host.

The choice is the one with the shortest predicted step among those that fit the memory. The step's forward and backward
passes are the same for all, so only the optimizer's own time is compared.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron.bridge.offload_engine.ceilings import Ceilings
from megatron.bridge.offload_engine.prediction import FP32, STREAMED_BYTES, Demand, Placement, predict_seconds
from megatron.bridge.offload_engine.streamed_state import NUM_BUFFERS, PIECE_ELEMENTS

HUNDREDTHS = range(0, 101, 2)
"""The fractions that are compared."""

AS_GOOD = 1.05
"""Of placements whose predictions differ by less, the one that moves least is chosen."""


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
    buffers = demand.num_hybrids * NUM_BUFFERS * STREAMED_BYTES * piece
    return with_shard * per_shard + resident * 2 * FP32 + buffers


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
