# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The resume matrix: which runs are stopped, how they go on, and what must be equal.

One uninterrupted run saves at several steps. From each save a run with a new model and a new optimizer goes on:

- as it was, or with another part of the optimizer offloaded: all that follows must be equal to the bit;
- in another layout: the optimizer's state, put together over all ranks, must be the saved one to the bit, and the
  losses equal up to the order of sums;
- with learning rate 0 and no weight decay: no weight may change.

Sizes are odd and buckets small, so that buckets end with padding and slices begin in the middle of a row.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.on_ranks import Recorder, differing
from tests.optimizer_state import Slice, slices_of, whole_state
from tests.tiny import VOCAB_SIZE, tiny_config

STEPS, SAVES = 5, (0, 1, 3, 4)
RESHARDED_AT = 3
"""The save from which another layout goes on."""
GLOBAL_BATCH = 12
LOSS_TOLERANCE = 1e-2
"""Relative, for sums in another order: weights are 16-bit."""
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
    "experts": {
        **SIZES,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 26,
        "moe_token_dispatcher_type": "alltoall",
        "expert_tensor_parallel_size": 1,
    },
}
BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 3000}
TP2, PP2, EP2 = ({f"{axis}_parallel_size": 2} for axis in ("tensor_model", "pipeline_model", "expert_model"))


@dataclass(frozen=True)
class Saved:
    """An uninterrupted run on two ranks, and how it saves."""

    kind: str = "dense"
    """dense, or experts."""
    layout: str = "DP 2"
    """DP 2, or EP 2: the experts spread over the data-parallel ranks."""
    precision: str = "bf16"
    fraction: float = 1.0
    """Of the optimizer on the CPU; 0: no offload."""
    precision_aware: bool = False
    overlap: bool = False
    form: str = "fully_reshardable"
    """The format, as checkpoints name it."""

    def __str__(self) -> str:
        mode = "aware" if self.precision_aware else "shards"
        overlap = "overlap" if self.overlap else "serial"
        model = f"{self.kind}-{self.layout}".replace(" ", "")
        return f"{model}-{self.precision}-{mode}-{self.fraction}-{overlap}-{self.form.partition('_')[0]}"


@dataclass(frozen=True)
class Change:
    """What is different in the run that goes on; None: nothing is."""

    ranks: int = 2
    layout: dict[str, Any] | None = None
    fraction: float | None = None
    refused: str = ""
    """What a dp_reshardable checkpoint answers; empty where it goes on."""

    @property
    def is_exact(self) -> bool:
        """On the CPU the offloaded optimizer computes the bits that the other does."""
        return self.ranks == 2 and self.layout is None


SAME = "as it was"
CHANGES = {
    SAME: Change(),
    "offload off": Change(fraction=0.0),
    "offload on": Change(fraction=1.0),
    "half offloaded": Change(fraction=0.5),
    "DP 1": Change(ranks=1, layout={}),
    "DP 4": Change(ranks=4, layout={}),
    "TP 2": Change(layout=TP2, refused="TP 1 -> 2"),
    "PP 2": Change(layout=PP2, refused="PP 1 -> 2"),
    "EP 1": Change(layout={}, refused="EP 2 -> 1"),
    "EP 2": Change(layout=EP2, refused="EP 1 -> 2"),
    "TP 2, EP 2": Change(layout={**TP2, **EP2, "sequence_parallel": True}, refused="TP 1 -> 2"),
    "TP 2, ETP 2": Change(
        layout={**TP2, "expert_tensor_parallel_size": 2, "sequence_parallel": True}, refused="TP 1 -> 2"
    ),
}


@dataclass(frozen=True)
class Cell:
    """A saved run and what is changed."""

    saved: Saved
    change: str = SAME

    def __str__(self) -> str:
        return f"{self.saved}-{self.change}".replace(", ", "+").replace(" ", "_")

    @property
    def refused(self) -> str:
        return CHANGES[self.change].refused if self.saved.form == "dp_reshardable" else ""


def every_cell() -> list[Cell]:
    """The whole matrix."""
    return [Cell(saved, change) for saved in _every_saved() for change in _changes_of(saved)]


def _every_saved() -> Iterator[Saved]:
    for (kind, layout), precision, form in itertools.product(
        (("dense", "DP 2"), ("experts", "EP 2"), ("experts", "DP 2")),
        ("bf16", "fp16"),
        ("dp_reshardable", "fully_reshardable"),
    ):
        if (kind, layout, form) == ("experts", "DP 2", "dp_reshardable"):
            continue  # the experts are parameters like any other
        yield Saved(kind, layout, precision, 0.0, form=form)
        for fraction, aware, overlap in itertools.product((0.5, 1.0), (False, True), (False, True)):
            yield Saved(kind, layout, precision, fraction, aware, overlap, form)


def _changes_of(saved: Saved) -> list[str]:
    if saved.layout == "DP 2" and saved.kind == "experts":
        return [SAME, "EP 2"]
    changes = [SAME, "DP 1" if saved.kind == "dense" and saved.overlap else "DP 4"]
    changes += ["TP 2", "PP 2"] if saved.kind == "dense" else ["EP 1", "TP 2, EP 2", "TP 2, ETP 2"]
    if saved.fraction == 0:
        changes.append("offload on")
    elif saved.fraction == 1 and not saved.overlap:
        changes += ["offload off", "half offloaded"]
    return changes


def cut(cells: list[Cell]) -> list[Cell]:
    """A few cells in which each value of each axis meets each value of each other that it meets in all of them."""
    left = {pair for cell in cells for pair in _pairs(cell)}
    chosen = []
    while left:
        best = max(cells, key=lambda cell: len(left & _pairs(cell)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[Any]:
    values = [*vars(cell.saved).items(), ("change", cell.change)]
    return set(itertools.combinations(values, 2))


@dataclass
class Seen:
    """What one rank saw of a run, to be compared."""

    by_step: list[dict[str, Any]] = field(default_factory=list)
    """Loss, learning rate, loss scale, samples and random numbers of each step."""
    loaded: list[Slice] = field(default_factory=list)
    saved: dict[int, list[Slice]] = field(default_factory=dict)
    """At each save."""
    ended: list[Slice] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    """Weights that are not what they were before the first step."""
    end: dict[str, Any] = field(default_factory=dict)
    """Train state and loss scaler."""
    padded_buckets: int = 0


class Witness(Recorder):
    """Sees a run, and saves it where it is told to."""

    def __init__(self, *, saves: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.seen, self._saves, self._samples = Seen(), saves, []

    def forward_step(self, state: Any, data_iterator: Any, model: Any) -> Any:
        from megatron.bridge.training.gpt_step import forward_step

        batch = next(data_iterator)
        self._samples += batch["tokens"][:, 0].tolist()  # the first token tells one from the others
        return forward_step(state, iter([batch]), model)

    def on_train_start(self, context: Any) -> None:
        super().on_train_start(context)
        self._save(context)
        if not self._saves:
            self.seen.loaded = slices_of(context.model, context.optimizer)
        buffers = [buffer for child in context.optimizer.chained_optimizers for buffer in child.buffers]
        self.seen.padded_buckets = sum(
            bucket.grad_data.numel() > bucket.numel_unpadded for buffer in buffers for bucket in buffer.buckets[:-1]
        )

    def on_train_step_start(self, context: Any) -> None:
        from megatron.core.tensor_parallel import random as core_random

        self._drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
        for name in ("model-parallel-rng", core_random.get_expert_parallel_rng_tracker_name()):
            with core_random.get_cuda_rng_tracker().fork(name):
                self._drawn.append(torch.rand(1, device=next(context.model[0].parameters()).device).item())

    def on_train_step_end(self, context: Any) -> None:
        super().on_train_step_end(context)
        self.seen.by_step.append(
            {
                "loss": self.losses[-1],
                "learning rate": self.learning_rates[-1],
                "loss scale": float(context.optimizer.get_loss_scale()),
                "samples": self._samples,
                "random numbers": self._drawn,
            }
        )
        self._samples = []
        self._save(context)

    def on_train_end(self, context: Any) -> None:
        super().on_train_end(context)
        self.seen.weights, self.seen.ended = self.weights_after, slices_of(context.model, context.optimizer)
        self.seen.moved = differing(self.weights_before, self.weights_after)
        scalers = [child.grad_scaler for child in context.optimizer.chained_optimizers]
        self.seen.end = {
            "train state": self.train_state,
            "loss scaler": [scaler and {k: float(v) for k, v in scaler.state_dict().items()} for scaler in scalers],
        }

    def _save(self, context: Any) -> None:
        from megatron.bridge.training.checkpointing import save_checkpoint

        train_state = context.state.train_state
        if train_state.step in self._saves:
            operations = train_state.floating_point_operations_so_far
            save_checkpoint(context.state, context.model, context.optimizer, context.scheduler, operations)
            self.seen.saved[train_state.step] = slices_of(context.model, context.optimizer)


def resume_config(directory: Path, cell: Cell, *, still: bool = False, steps: int = STEPS, **checkpoint: Any) -> Any:
    """The configuration of a cell's run on the ranks that there are."""
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    saved, change = cell.saved, CHANGES[cell.change]
    layout = change.layout if change.layout is not None else EP2 if saved.layout == "EP 2" else {}
    if change.ranks != 2 and saved.layout == "EP 2":
        layout = EP2
    fraction = saved.fraction if change.fraction is None else change.fraction
    optimizer = {"optimizer_cpu_offload": fraction > 0, "optimizer_offload_fraction": fraction}
    optimizer["overlap_cpu_optimizer_d2h_h2d"] = saved.overlap and fraction > 0
    optimizer["use_precision_aware_optimizer"] = saved.precision_aware and fraction > 0
    if still:
        optimizer |= {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
    across = layout.get("tensor_model_parallel_size", 1) * layout.get("pipeline_model_parallel_size", 1)
    cfg = tiny_config(
        directory,
        train_iters=steps,
        model={**MODELS[saved.kind], **layout},
        optimizer=optimizer,
        scheduler={"lr_warmup_iters": 2, "lr_decay_iters": 10, "override_opt_param_scheduler": still},
        train={"micro_batch_size": GLOBAL_BATCH // (dist.get_world_size() // across)},
        dataset={"dataloader_type": "cyclic"},
        ddp=BUCKETS,
        checkpoint={
            "save": None,
            "pretrained_checkpoint": f"{directory}/{saved.kind}",
            "dist_ckpt_optim_fully_reshardable": saved.form == "fully_reshardable",
            **checkpoint,
        },
    )
    cfg.train.global_batch_size = GLOBAL_BATCH
    cfg.mixed_precision = get_mixed_precision_config(f"{saved.precision}_mixed")
    cfg.mixed_precision.initial_loss_scale = 2.0**8  # no step overflows
    cfg.mixed_precision.loss_scale_window = 2  # and the scale grows on the way
    cfg.mixed_precision.grad_reduce_in_fp32 = True  # precision-aware mode wants it for FP16
    return cfg


def _finetune(cfg: Any, **witness: Any) -> Seen:
    from megatron.bridge.training.finetune import finetune

    witness = Witness(**witness)
    finetune(cfg, witness.forward_step, callbacks=[witness])
    return witness.seen


def run_through(directory: Path, run: str, saved: Saved) -> Seen:
    """The uninterrupted run."""
    return _finetune(resume_config(directory, Cell(saved), save=f"{directory}/{run}"), saves=SAVES)


def resume(directory: Path, run: str, cell: Cell, step: int) -> tuple[Seen, dict[str, float]]:
    """A run that goes on from a save; and what a step at learning rate 0 changes there."""
    load = {"load": f"{directory}/{run}", "ckpt_step": step}
    seen = _finetune(resume_config(directory, cell, **load))
    return seen, _finetune(resume_config(directory, cell, still=True, steps=step + 1, **load)).moved


def refusal(directory: Path, run: str, cell: Cell, step: int) -> str:
    """What a run that can't go on says."""
    try:
        resume(directory, run, cell, step)
    except ValueError as error:
        return str(error)
    return "nothing: it went on"


def apart(whole: list[Seen], resumed: list[Seen], step: int, *, exact: bool) -> list[str]:
    """In what a resumed run is not the uninterrupted one, by rank in both; nothing where it is."""
    wrong = _states("loaded", [seen.saved[step] for seen in whole], [seen.loaded for seen in resumed])
    if exact:
        wrong += _states("ended", [seen.ended for seen in whole], [seen.ended for seen in resumed])
        for rank, (one, other) in enumerate(zip(whole, resumed, strict=True)):
            wrong += [f"rank {rank}, {name}" for name in one.end if one.end[name] != other.end[name]]
            wrong += [f"rank {rank}, weight {name}" for name in differing(one.weights, other.weights)]
            wrong += _steps(f"rank {rank}, ", one.by_step[step:], other.by_step)
        return wrong
    steps, others = _over_ranks(whole), _over_ranks(resumed)
    return wrong + _steps("", steps[step:], others)


def _states(when: str, whole: list[list[Slice]], resumed: list[list[Slice]]) -> list[str]:
    states = [whole_state(slices, vocab_size=VOCAB_SIZE) for slices in (whole, resumed)]
    return [f"{when}: {name} is off by {by}" for name, by in differing(*states).items()]


def _steps(where: str, whole: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> list[str]:
    assert len(whole) == len(resumed) > 0, (len(whole), len(resumed))
    return [
        f"{where}step {number} of {len(whole)}, {name}: {other[name]}, expected {one[name]}"
        for number, (one, other) in enumerate(zip(whole, resumed, strict=True))
        for name in one
        if one[name] != other[name]
    ]


class _Close(float):
    """Equal up to the order of sums."""

    def __eq__(self, other: object) -> bool:
        return abs(self - other) <= LOSS_TOLERANCE * abs(self)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__


def _over_ranks(seen: list[Seen]) -> list[dict[str, Any]]:
    """Each step as any layout sees it: which rank reads which sample, and its random numbers, depend on the layout."""
    return [
        {
            "loss": _Close(of_ranks[0]["loss"]),
            "learning rate": of_ranks[0]["learning rate"],
            "loss scale": of_ranks[0]["loss scale"],
            "samples": {sample for step in of_ranks for sample in step["samples"]},
        }
        for of_ranks in zip(*(one.by_step for one in seen), strict=True)
    ]
