# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The resume matrix as data: which runs are stopped and how they resume. `tests/rigs/resume.py` says what must hold.

Sizes are odd and buckets small, so that buckets end with padding and slices begin in the middle of a row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.rigs.covering import covering, pairs_of
from tests.rigs.tiny import fp32_norm_layer_spec

STEPS, SAVES = 5, (0, 1, 3)
RESHARDED_AT = 3
"""The save from which another layout resumes."""
SIZES = {
    "num_layers": 2,
    "hidden_size": 36,
    "ffn_hidden_size": 54,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "init_method_std": 0.1,
}
MODELS = {
    "dense": SIZES,
    "tied": {**SIZES, "share_embeddings_and_output_weights": True},
    "FP32 norms": {**SIZES, "transformer_layer_spec": fp32_norm_layer_spec},
    "experts": {
        **SIZES,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 26,
        "moe_token_dispatcher_type": "alltoall",
    },
}
AXES = ("TP", "PP", "EP", "ETP")
"""The parallel sizes that vary."""
LAYOUTS = {
    "DP 1": (1, {}),
    "DP 2": (2, {}),
    "DP 3": (3, {}),
    "DP 4": (4, {}),
    "TP 2": (2, {"TP": 2}),
    "PP 2": (2, {"PP": 2}),
    "PP 2, DP 2": (4, {"PP": 2}),
    "EP 2": (2, {"EP": 2}),
    "EP 2, DP 4": (4, {"EP": 2}),
    "TP 2, EP 2": (2, {"TP": 2, "EP": 2}),
    "TP 2, ETP 2": (2, {"TP": 2, "ETP": 2}),
}
"""The number of ranks, and the parallel sizes that aren't 1. EP 2 spreads the experts over data-parallel ranks."""
BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 3000}
ONE_BUCKET = {"overlap_grad_reduce": False, "bucket_size": None}
SAME = "as it was"
FRACTIONS = {"offload off": 0.0, "offload on": 1.0, "half offloaded": 0.5}
"""Changes of the optimizer. On the CPU the offloaded one computes the bits that the other does."""


@dataclass(frozen=True)
class Saved:
    """An uninterrupted run, and how it saves."""

    kind: str = "dense"
    """In `MODELS`."""
    layout: str = "DP 2"
    """In `LAYOUTS`."""
    precision: str = "bf16"
    optimizer: str = "distributed"
    """Or, each rank stepping on all of its weights, "adam" or "sgd"."""
    fraction: float = 1.0
    """Of the optimizer on the CPU; 0: no offload."""
    precision_aware: bool = False
    overlap: bool = False
    form: str = "fully_reshardable"
    """The format, as checkpoints name it."""
    streamed: float = 0.0
    """Of the offloaded part, what the device steps on."""
    in_bf16: bool = False
    """Whether the host keeps moments and gradients in BF16."""
    overlapped_step: bool = False
    """Whether the step returns early."""
    gathered_late: bool = False
    """Whether data-parallel ranks gather weights in the next forward pass."""

    def __str__(self) -> str:
        mode = "aware" if self.precision_aware else "shards"
        overlap = "overlapped_step" if self.overlapped_step else "overlap" if self.overlap else "serial"
        model = f"{self.kind}-{self.layout}".replace(", ", "+").replace(" ", "")
        if self.optimizer != "distributed":
            return f"{model}-{self.precision}-{self.optimizer}"
        mode += "+BF16" if self.in_bf16 else ""
        streamed = f"-streamed-{self.streamed}" if self.streamed else ""
        streamed += "-gathered_late" if self.gathered_late else ""
        return f"{model}-{self.precision}-{mode}-{self.fraction}-{overlap}-{self.form.partition('_')[0]}{streamed}"

    @property
    def plain(self) -> "Saved":
        """The run whose bits this one computes on the CPU: nothing is offloaded, unless the host rounds its state."""
        plain = Saved(self.kind, self.layout, self.precision, self.optimizer, fraction=0.0)
        if not self.in_bf16:
            return plain
        return replace(plain, fraction=self.fraction, precision_aware=True, in_bf16=True)


@dataclass(frozen=True)
class Cell:
    """A saved run and what is changed in the run that resumes it."""

    saved: Saved
    change: str = SAME
    """`SAME`, or in `LAYOUTS` or `FRACTIONS`."""

    def __str__(self) -> str:
        return f"{self.saved}-{self.change}".replace(", ", "+").replace(" ", "_")

    @property
    def layout(self) -> str:
        return self.change if self.change in LAYOUTS else self.saved.layout

    @property
    def refused(self) -> str:
        """What a dp_reshardable checkpoint answers; empty where the run resumes."""
        if self.saved.form != "dp_reshardable":
            return ""
        was, now = (LAYOUTS[layout][1] for layout in (self.saved.layout, self.layout))
        changed = (size for size in AXES if was.get(size, 1) != now.get(size, 1))
        return next((f"{size} {was.get(size, 1)} -> {now.get(size, 1)}" for size in changed), "")


def every_cell() -> list[Cell]:
    """The whole matrix."""
    return [
        *(Cell(saved, change) for saved in _every_saved() for change in _changes_of(saved)),
        *OTHERS,
        *IN_BF16,
        *NOT_DISTRIBUTED,
    ]


def _every_saved() -> Iterator[Saved]:
    for (kind, layout), precision, form in itertools.product(
        (("dense", "DP 2"), ("experts", "EP 2"), ("experts", "DP 2")),
        ("bf16", "fp16"),
        ("dp_reshardable", "fully_reshardable"),
    ):
        if (kind, layout, form) == ("experts", "DP 2", "dp_reshardable"):
            continue  # the experts are parameters like any other
        yield Saved(kind, layout, precision, fraction=0.0, form=form)
        for fraction, aware, overlap in itertools.product((0.5, 1.0), (False, True), (False, True)):
            yield Saved(kind, layout, precision, "distributed", fraction, aware, overlap, form)


def _changes_of(saved: Saved) -> list[str]:
    if saved.kind == "experts" and saved.layout == "DP 2":
        return [SAME, "EP 2"]
    if saved.kind == "experts":
        changes = [SAME, "EP 2, DP 4", "DP 2", "TP 2, EP 2", "TP 2, ETP 2"]
    else:
        changes = [SAME, "DP 1" if saved.overlap else "DP 4", "TP 2", "PP 2"]
    if saved.fraction == 0:
        changes.append("offload on")
    elif saved.fraction == 1 and not saved.overlap:
        changes += ["offload off", "half offloaded"]
    return changes


OTHERS = [
    Cell(Saved("tied"), "PP 2"),
    Cell(Saved("tied", "PP 2"), "DP 2"),
    Cell(Saved("FP32 norms", "TP 2", fraction=0.5), "DP 2"),
    Cell(Saved("FP32 norms", fraction=0.5)),
    Cell(Saved("FP32 norms", fraction=0.5, form="dp_reshardable")),
    Cell(Saved("experts", "PP 2"), "DP 2"),
    Cell(Saved("dense", "TP 2"), "DP 2"),
    Cell(Saved("dense", "TP 2"), "PP 2, DP 2"),
    Cell(Saved("dense", "PP 2"), "DP 2"),
    Cell(Saved("dense", "DP 3", fraction=0.5)),
    Cell(Saved("dense", "DP 2"), "DP 3"),
    *(
        Cell(Saved(precision="fp32", fraction=fraction, precision_aware=aware, form=form), change)
        for fraction, aware, form, change in (
            (0.0, False, "dp_reshardable", SAME),
            (0.0, False, "fully_reshardable", "TP 2"),
            (0.5, False, "dp_reshardable", SAME),
            (0.5, True, "fully_reshardable", SAME),
            (1.0, True, "dp_reshardable", SAME),
            (1.0, False, "fully_reshardable", "offload off"),
        )
    ),
    Cell(Saved("experts", "EP 2", precision="fp32", fraction=0.0)),
    Cell(Saved(precision_aware=True, overlap=True, form="dp_reshardable", streamed=1.0)),
    Cell(Saved(streamed=0.5), "TP 2"),
    Cell(Saved(streamed=0.5), "offload off"),
]
"""Beside the product: what is special about one model or layout."""

IN_BF16 = [
    Cell(Saved("experts", "EP 2", "bf16", "distributed", fraction, True, overlap, form, in_bf16=True), change)
    for fraction, overlap, form, change in (
        (1.0, False, "fully_reshardable", SAME),
        (1.0, True, "dp_reshardable", SAME),
        (1.0, True, "fully_reshardable", "TP 2, EP 2"),
        (0.5, True, "fully_reshardable", SAME),
        (0.5, False, "dp_reshardable", SAME),
    )
]
"""The host's moments and gradients in BF16. Of these the cut has none: `test_order_of_resumes.py` resumes some."""


def _plain(optimizer: str, precision: str = "bf16", kind: str = "dense", layout: str = "DP 2") -> Saved:
    return Saved(kind, layout, precision, optimizer, fraction=0.0)


NOT_DISTRIBUTED = [
    *(
        Cell(_plain(optimizer, precision), change)
        for optimizer in ("adam", "sgd")
        for precision in ("bf16", "fp16", "fp32")
        for change in (SAME, "DP 1", "DP 4", "TP 2", "PP 2")
    ),
    *(
        Cell(_plain(optimizer, precision, *model))
        for optimizer in ("adam", "sgd")
        for precision in ("bf16", "fp32")
        for model in (("experts", "EP 2"), ("FP32 norms", "DP 2"), ("tied", "PP 2"))
    ),
    Cell(_plain("adam", kind="tied", layout="PP 2"), "DP 2"),
    Cell(_plain("adam", "fp32", "dense", "TP 2"), "PP 2"),
]
"""Without the distributed optimizer, which offload needs: state is stored by weight, and fits any layout."""

NOT_DISTRIBUTED_IN_SHORT = [
    Cell(_plain("adam")),
    Cell(_plain("adam"), "TP 2"),
    Cell(_plain("sgd", "fp16")),
    Cell(_plain("sgd", "fp16"), "PP 2"),
    Cell(_plain("adam", "fp32"), "DP 1"),
    Cell(_plain("sgd", "fp32", "experts", "EP 2")),
]


def cut(cells: list[Cell]) -> list[Cell]:
    """A few cells in which each value of each axis meets each value of each other that it meets in all of them.

    Of what is refused, one of each kind; of what isn't distributed, a few.
    """
    product = [cell for cell in cells if cell not in (*OTHERS, *IN_BF16, *NOT_DISTRIBUTED)]
    chosen = covering(product, _pairs, rather=lambda cell, chosen: cell.saved in {one.saved for one in chosen})
    return chosen + OTHERS + NOT_DISTRIBUTED_IN_SHORT


def _pairs(cell: Cell) -> set[Any]:
    if cell.refused:
        return {cell.refused}
    return pairs_of({**vars(cell.saved), "change": cell.change})


def in_streams() -> list[Cell]:
    """What the whole matrix lacks of how a step overlaps: each value meets each other that it may meet."""
    product = [
        Cell(Saved("experts", "EP 2", "bf16", "distributed", fraction, aware, overlap, form, *how), change)
        for fraction, aware, overlap, form, how, change in itertools.product(
            (0.5, 1.0),
            (False, True),
            (False, True),
            ("dp_reshardable", "fully_reshardable"),
            itertools.product((0.0, 0.5, 1.0), (False, True), (False, True), (False, True)),
            (SAME, "TP 2, EP 2", "offload off"),
        )
    ]
    return covering([cell for cell in product if _is_possible(cell)], _pairs, besides=every_cell())


def _is_possible(cell: Cell) -> bool:
    saved = cell.saved
    is_in_fp32 = cell.change == "offload off"
    return (
        not cell.refused
        and (not saved.in_bf16 or (saved.precision_aware and not saved.streamed and not is_in_fp32))
        and (not saved.overlapped_step or (saved.overlap and not saved.streamed))
    )
