# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A machine that was measured, and what the planner's prediction makes of its ceilings: whole steps, for any model.

`gpu_measured.json` has what one machine can do, and what steps took on it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from megatron.bridge.offload_engine.ceilings import Ceilings
from megatron.bridge.offload_engine.prediction import Demand, Placement, predict_seconds, reckon

MEASURED = Path(__file__).with_name("gpu_measured.json")

VOCAB = 8192
"""Of the model that was measured."""

OTHER_BYTES = 18
"""Device memory that each step reads or writes for a parameter, offloaded or not, beside Adam: the norm of its gradient
(4), clipping it (8), rounding its master to its weight (6)."""
ADAM_BYTES = 28
"""The same of Adam: master, gradient and two moments, three of them also written."""

ASSUMED_FLOPS = 400e12
"""A second, of a model of 8 billion parameters: 40 % of the card's peak. Not measured."""


@dataclass(frozen=True)
class Shape:
    """A model, and what one rank computes in a step."""

    name: str
    elements: int
    micro_batches: int
    compute_seconds: float
    """Of all forward and backward passes, and of the rest of a step beside its optimizer."""

    @property
    def forward_seconds(self) -> float:
        """Of one micro-batch: a third of what is computed for it."""
        return self.compute_seconds / self.micro_batches / 3


@dataclass(frozen=True)
class Way:
    """A way of offloading."""

    name: str
    overlaps: bool = False
    hides: bool = False
    """Whether the copies to the host run beside the last backward pass, and the host's Adam beside the next forward."""
    rounds: bool = False
    """Whether the host rounds the weights."""

    def demand(self, shape: Shape) -> Demand:
        """What the optimizer of a shape is, this way."""
        demand = Demand(shape.elements, float("inf"), overlaps=self.overlaps, weight_bytes=2 if self.rounds else 4)
        if not self.hides:
            return demand
        return replace(demand, forward_seconds=shape.forward_seconds, backward_seconds=2 * shape.forward_seconds)


IN_A_ROW = Way("in a row")
COPIES = Way("copies overlap", overlaps=True)
STEPS = Way("steps overlap", overlaps=True, hides=True)
ROUNDED = Way("steps overlap, precision-aware", overlaps=True, hides=True, rounds=True)


class Machine:
    """What was measured on one."""

    def __init__(self, measured: dict[str, Any]) -> None:
        """
        Args:
            measured: As in `gpu_measured.json`.
        """
        self.measured, shape = measured, measured["shape"]
        self.elements = shape["hidden_size"] * (VOCAB + shape["num_layers"] * 16 * shape["hidden_size"])
        without = measured["without_offload"]
        self.compute_seconds = (without["step_ms"] - without["optimizer_ms"]) / 1e3
        self.ceilings = Ceilings(**measured["ceilings"], host_adam=measured["ceilings"]["host_adam_alone"])
        of_adam = reckon(self.ceilings, Demand(self.elements, 0.0), Placement(0.0, 0.0)).device_seconds
        self._fixed_seconds = without["optimizer_ms"] / 1e3 - of_adam * (1 + OTHER_BYTES / ADAM_BYTES)
        self.beside_copies = self._share_beside_copies()
        self.ceilings = replace(self.ceilings, host_adam=self.beside_copies * self.ceilings.host_adam_alone)

    def _share_beside_copies(self) -> float:
        """Of Adam's speed on the host, what copies beside it leave: what explains the steps whose copies overlap."""
        shares = []
        for step in self.measured["steps"]:
            if step["overlap"]:
                shape, placement = self.shape(), Placement(step["fraction"], 0.0)
                alone = reckon(self.ceilings, COPIES.demand(shape), placement)
                ends = alone.seconds - alone.host_seconds
                took = step["optimizer_ms"] / 1e3 - self.other_seconds(shape.elements) - ends
                shares.append(alone.host_seconds / took)
        return median(shares)

    def other_seconds(self, elements: int) -> float:
        """Of the optimizer, what each step takes however it is placed: norm, clipping, rounding, launches."""
        return self._fixed_seconds + OTHER_BYTES / ADAM_BYTES * elements / self.ceilings.device_adam

    def shape(self, times: int = 1) -> Shape:
        """The model that was measured, with so many times its tokens."""
        tokens = times * self.measured["shape"]["seq_length"] * self.measured["shape"]["micro_batches"]
        name = f"8 layers of 2048, {tokens:,} tokens"
        return Shape(name, self.elements, self.measured["shape"]["micro_batches"], times * self.compute_seconds)

    def step_seconds(self, shape: Shape, way: Way, placement: Placement) -> float:
        """Of a whole step."""
        optimizer = predict_seconds(self.ceilings, way.demand(shape), placement)
        return shape.compute_seconds + self.other_seconds(shape.elements) + optimizer

    def ratio(self, shape: Shape, way: Way, placement: Placement) -> float:
        """Of a whole step, to the one without offload."""
        return self.step_seconds(shape, way, placement) / self.step_seconds(shape, IN_A_ROW, Placement(0.0, 0.0))


def of_8b(tokens: int, micro_batches: int) -> Shape:
    """Llama 3.1 8B on one rank."""
    elements = 8_030_261_248
    return Shape(
        f"8B, {tokens:,} tokens in {micro_batches} micro-batch{'es' * (micro_batches > 1)}",
        elements,
        micro_batches,
        6 * elements * tokens / ASSUMED_FLOPS,
    )


def read_machine() -> Machine:
    """The one in `gpu_measured.json`."""
    return Machine(json.loads(MEASURED.read_text(encoding="utf-8")))
