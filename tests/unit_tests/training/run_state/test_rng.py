# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which random states are put back, which start over, and which are damaged."""

import logging
import random

import numpy as np
import pytest
import torch

from tests.rigs.ranks import run_on_ranks

GPU_STATE = torch.arange(16, dtype=torch.uint8)
HOST = ("random_rng_state", "np_rng_state", "torch_rng_state")


def _changed(states, changes):
    """States with `changes` in them, by key; `tracker` is all of the tracker's, None leaves a key out."""
    changed = dict(states)
    for key, value in changes.items():
        if key == "tracker":
            changed["rng_tracker_states"] = {name: value for name in states["rng_tracker_states"]}
        else:
            changed[key] = value
    return {key: value for key, value in changed.items() if not (key in changes and changes[key] is None)}


def _same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first == second


def _restored(changes, only_on=None):
    """What each kind of state is behind a restore: the stored one, or this run's own; and what was said."""
    from megatron.bridge.training.run_state.rng import current_states, logger, restore_rng_state
    from megatron.bridge.utils.distributed import model_parallel_groups, rank, seed_everything

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with model_parallel_groups(1, 1, seed=5):
            for draw in (random.random, np.random.rand, lambda: torch.rand(3)):
                draw()
            stored = current_states()
            loaded = _changed(stored, changes) if only_on in (None, rank()) else stored
            seed_everything(6)
            own = current_states()
            try:
                restore_rng_state([loaded])
            except (ValueError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}", said
            after = current_states()
    finally:
        logger.removeHandler(handler)
    return {
        key: ["stored"] * _same(after[key], stored[key]) + ["own"] * _same(after[key], own[key]) for key in after
    }, said


def test_what_fits_is_put_back():
    for kinds, said in run_on_ranks(_restored, 2, {}):
        assert set(map(tuple, kinds.values())) == {("stored",)} and said == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cuda_rng_state": GPU_STATE, "tracker": GPU_STATE}, "cuda_rng_state"),
        ({"cuda_rng_state": GPU_STATE}, "cuda_rng_state"),
        ({"tracker": GPU_STATE}, "rng_tracker_states['"),
    ],
)
@pytest.mark.parametrize("only_on", [None, 0, 1])
def test_the_devices_states_start_anew_together_and_on_all_ranks(changes, named, only_on):
    results = run_on_ranks(_restored, 2, changes, only_on=only_on)
    for kinds, _ in results:
        assert kinds["rng_tracker_states"] == ["own"]
        assert all(kinds[key] == ["stored"] for key in HOST)
    (line,) = [line for _, said in results for line in said]
    assert named in line and "has the 16 bytes of a GPU" in line and "\n" not in line


DAMAGED = [
    ({"cuda_rng_state": torch.zeros(40, dtype=torch.uint8)}, "cuda_rng_state"),
    ({"cuda_rng_state": torch.zeros(16)}, "cuda_rng_state"),
    ({"cuda_rng_state": torch.zeros(4, 4, dtype=torch.uint8)}, "cuda_rng_state"),
    ({"cuda_rng_state": torch.zeros(5056, dtype=torch.uint8)}, "cuda_rng_state"),
    ({"cuda_rng_state": b"0" * 16}, "cuda_rng_state"),
    ({"cuda_rng_state": None}, "cuda_rng_state"),
    ({"tracker": torch.zeros(0, dtype=torch.uint8)}, "rng_tracker_states['"),
    ({"tracker": torch.zeros(5056, dtype=torch.uint8)}, "rng_tracker_states['"),
    ({"rng_tracker_states": [GPU_STATE]}, "rng_tracker_states"),
    ({"torch_rng_state": GPU_STATE}, "torch_rng_state"),
    ({"np_rng_state": ("MT19937", [1, 2, 3], 0, 0, 0.0)}, "np_rng_state"),
    ({"random_rng_state": (3, (1, 2), None)}, "random_rng_state"),
]


@pytest.mark.parametrize(("changes", "named"), DAMAGED)
def test_a_damaged_state_ends_all_ranks_in_a_line_that_names_it(changes, named):
    (of_first, said), (of_second, _) = run_on_ranks(_restored, 2, changes, only_on=0)
    assert of_first.startswith(f"ValueError: the checkpoint's {named}") and "is no random state" in of_first
    assert "failed on rank 0: ValueError: the checkpoint's" in of_second and "\n" not in of_first + of_second
    assert said == []


def _with_generators(state):
    from megatron.core import tensor_parallel

    from megatron.bridge.training.run_state.rng import current_states, restore_rng_state
    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(1, 1, seed=5):
        states = current_states()
        kept = torch.Generator().manual_seed(9) if state == "generator" else state
        states["rng_tracker_states"] = {"model-parallel-rng": kept}
        restore_rng_state([states])
        return tensor_parallel.get_cuda_rng_tracker().get_states()["model-parallel-rng"] is kept


def test_a_generator_in_the_tracker_is_put_back_as_it_is():
    assert run_on_ranks(_with_generators, 1, "generator") == [True]
