# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A save and a resume where streams and events order only what they promise: the run that wasn't stopped, bit-exact."""

from pathlib import Path
from typing import Any

import torch

from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import DEFAULT_FIRST, HOST_FIRST, SIDES_FIRST
from tests.rigs.on_ranks import differing, fill_weights, weights_of
from tests.rigs.ranks import run_on_ranks
from tests.rigs.sync import Cell, Model, Rig, Run, Stepper, config, offload_options, start
from tests.rigs.sync_matrix import load, moments

IN_BF16 = Cell(Model(), precision_aware=True, fraction=1.0, overlap=True, in_bf16=True)
HALF_IN_BF16 = Cell(Model(), precision_aware=True, fraction=0.5, overlap=True, in_bf16=True)
IN_FP32 = Cell(Model("bf16+fp32"), precision_aware=False, fraction=1.0, overlap=True)


def _started(rig: Rig, cell: Cell, **checkpoint: Any) -> Run:
    checkpoint["dist_ckpt_optim_fully_reshardable"] = cell != IN_BF16
    return start(config(rig.directory, rig.model, offload=offload_options(cell), checkpoint=checkpoint), rig.whole)


def _state(run: Run) -> dict[str, torch.Tensor]:
    """A copy of weights and moments."""
    of_optimizer = {f"moment {at}": value.cpu().float() for at, value in enumerate(moments(run.optimizer))}
    return {**{name: weight.clone() for name, weight in weights_of(run.model).items()}, **of_optimizer}


def _stopped_and_resumed(rig: Rig, cell: Cell, name: str) -> list[dict[str, torch.Tensor]]:
    """What the run that continues comes to, and what the one that resumes its checkpoint does."""
    from megatron.bridge.training.checkpointing import save_checkpoint
    from megatron.bridge.training.state import GlobalState

    fill_weights(rig.whole, seed=1)
    run, ends = _started(rig, cell, save=name), []
    stepper, state = Stepper(run, None), GlobalState(run.cfg)
    stepper.step()
    state.train_state.step = 1
    save_checkpoint(state, run.model, run.optimizer, run.scheduler, 0)
    stepper.step()
    ends.append(_state(run))
    fill_weights(rig.whole, seed=99)
    resumed = _started(rig, cell, load=name)
    load(resumed)
    Stepper(resumed, None).step()
    return [*ends, _state(resumed)]


def _apart(directory: Path, cell: Cell) -> dict[Any, dict[str, float]]:
    """What differs from the run on the ordinary accelerator that wasn't stopped, by order and run."""
    rig, apart = Rig(directory, cell.model), {}
    expected, *others = _stopped_and_resumed(rig, cell, "in order")
    apart["in order", 1] = differing(expected, others[0])
    for order in (HOST_FIRST, DEFAULT_FIRST, SIDES_FIRST):
        with adversarial_streams(order):
            found = _stopped_and_resumed(rig, cell, str(order))
        apart |= {(order, at): differing(expected, end) for at, end in enumerate(found)}
    rig.close()
    return {of: differences for of, differences in apart.items() if differences}


def test_a_run_is_saved_and_resumed_the_same(tmp_path):
    for cell in (IN_BF16, HALF_IN_BF16, IN_FP32):
        assert run_on_ranks(_apart, 1, tmp_path / str(cell), cell) == [{}], str(cell)
