# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a cell of the resume matrix runs, and what must be equal.

One uninterrupted run saves at several steps. From each save a run with a new model and a new optimizer resumes:

- as it was, or with another part of the optimizer offloaded: all that follows must be bit-exact;
- in another layout: the optimizer's state, put together over all ranks, must be the saved one, bit-exact, and the
  losses equal up to the order of sums;
- with learning rate 0 and no weight decay: no weight may change.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES
from tests.rigs.on_ranks import Recorder, differing
from tests.rigs.optimizer_state import Slice, slices_of, whole_state
from tests.rigs.resume_matrix import AXES, BUCKETS, FRACTIONS, LAYOUTS, MODELS, SAVES, STEPS, Cell, Saved
from tests.rigs.tiny import BF16_STATE, GATHERED_LATE, VOCAB_SIZE, tiny_config

GLOBAL_BATCH = 12
LOSS_TOLERANCE = 1e-2
"""Relative, for sums in another order: weights are 16-bit."""


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

    reads_weights = False  # but in saves, which wait for them, and at the end

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
        buffers = [buffer for chunk in context.model for buffer in chunk.buffers]
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
        scalers = [vars(child).get("grad_scaler") for child in context.optimizer.chained_optimizers]
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


def resume_config(
    directory: Path, cell: Cell, *, ddp: dict[str, Any] = BUCKETS, still: bool = False, steps: int = STEPS, **load: Any
) -> Any:
    """The configuration of a cell's run on the ranks that there are."""
    from megatron.bridge.training.config.mixed_precision import get_mixed_precision_config

    saved, sizes = cell.saved, LAYOUTS[cell.layout][1]
    fraction = FRACTIONS.get(cell.change, saved.fraction)
    model = {**MODELS[saved.kind], **{PARALLEL_SIZES[short].field: sizes.get(short, 1) for short in AXES}}
    model["sequence_parallel"] = saved.kind == "experts" and "TP" in sizes  # which Core wants of them
    data_parallel_size = dist.get_world_size() // (sizes.get("TP", 1) * sizes.get("PP", 1))
    is_distributed = saved.optimizer == "distributed"
    cfg = tiny_config(
        directory,
        train_iters=steps,
        model=model,
        optimizer={
            "optimizer": "adam" if is_distributed else saved.optimizer,
            "use_distributed_optimizer": is_distributed,
            "optimizer_cpu_offload": fraction > 0,
            "optimizer_offload_fraction": fraction,
            "overlap_cpu_optimizer_d2h_h2d": (saved.overlap or saved.overlapped_step) and fraction > 0,
            "overlap_cpu_optimizer_step": saved.overlapped_step and fraction > 0,
            "use_precision_aware_optimizer": saved.precision_aware and fraction > 0,
            "optimizer_streamed_fraction": saved.streamed if fraction > 0 else 0.0,
            **(BF16_STATE if saved.in_bf16 else {}),
            # What resumes stores masters in the other way.
            "optimizer_split_masters": saved.in_bf16 and saved.overlap == ("load" not in load),
            **({"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0} if still else {}),
        },
        scheduler={"lr_warmup_iters": 2, "lr_decay_iters": 10, "override_opt_param_scheduler": still},
        train={"micro_batch_size": GLOBAL_BATCH // data_parallel_size, "global_batch_size": GLOBAL_BATCH},
        dataset={"dataloader_type": "cyclic"},
        ddp={**ddp, **(GATHERED_LATE if saved.gathered_late else {}), "use_distributed_optimizer": is_distributed},
        checkpoint={
            "save": None,
            "pretrained_checkpoint": f"{directory}/{saved.kind}",
            # The run that resumes would save in the other format: how to read is the checkpoint's to say.
            "dist_ckpt_optim_fully_reshardable": (saved.form == "fully_reshardable") != ("load" in load),
            **load,
        },
    )
    if saved.precision == "fp32":
        cfg.mixed_precision = None
        return cfg
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


def run_through(directory: Path, run: str, saved: Saved, *, saves: tuple[int, ...] = SAVES, **options: Any) -> Seen:
    """The uninterrupted run, which saves at these steps."""
    return _finetune(resume_config(directory, Cell(saved), save=f"{directory}/{run}", **options), saves=saves)


def resume(
    directory: Path, run: str, cell: Cell, step: int, *, and_still: bool = True, **options: Any
) -> tuple[Seen, dict[str, float]]:
    """A run that resumes from a save; and, if asked for, what a step at learning rate 0 changes there."""
    options.update(load=f"{directory}/{run}", ckpt_step=step)
    seen = _finetune(resume_config(directory, cell, **options))
    if not and_still:
        return seen, {}
    return seen, _finetune(resume_config(directory, cell, still=True, steps=step + 1, **options)).moved


def without_repairs(names: tuple[str, ...] | None, fn: Callable, *args: Any, **options: Any) -> Any:
    """Call a function while repairs are left out, None being all; gives the text of an error that it raises."""
    from megatron.bridge.core_repairs import install
    from megatron.bridge.utils.replaced import replaced

    left = tuple(repair for repair in install.REPAIRS if names is not None and repair.name not in names)
    try:
        with replaced(install, REPAIRS=left):
            return fn(*args, **options)
    except Exception as error:  # Core's defects end in all kinds of errors
        return f"{type(error).__name__}: {error}"


def apart(whole: list[Seen], resumed: list[Seen], step: int, *, exact: bool) -> list[str]:
    """In what a resumed run is not the uninterrupted one, by rank in both; nothing where it is."""
    wrong = _states("loaded", [seen.saved[step] for seen in whole], [seen.loaded for seen in resumed])
    if exact:
        return wrong + _courses_apart(whole, resumed, step)
    steps, others = _over_ranks(whole), _over_ranks(resumed)
    return wrong + _steps("", steps[step:], others)


def unlike(expected: list[Seen], found: list[Seen]) -> list[str]:
    """In what two runs of the same configuration differ, by rank; nothing where they are bit-exact."""
    saves = [f"saved at {step}" for step in expected[0].saved]
    states = [[[*seen.saved.values()] for seen in run] for run in (expected, found)]
    wrong = [
        text for at, when in enumerate(saves) for text in _states(when, *([one[at] for one in run] for run in states))
    ]
    if expected[0].loaded:
        wrong += _states("loaded", [seen.loaded for seen in expected], [seen.loaded for seen in found])
    return wrong + _courses_apart(expected, found, 0)


def _courses_apart(whole: list[Seen], resumed: list[Seen], step: int) -> list[str]:
    """In what the steps from one on, and what they come to, are not the same, by rank."""
    wrong = _states("ended", [seen.ended for seen in whole], [seen.ended for seen in resumed])
    for rank, (one, other) in enumerate(zip(whole, resumed, strict=True)):
        wrong += [f"rank {rank}, {name}" for name in one.end if one.end[name] != other.end[name]]
        wrong += [f"rank {rank}, weight {name}" for name in differing(one.weights, other.weights)]
        wrong += _steps(f"rank {rank}, ", one.by_step[step:], other.by_step)
    return wrong


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
