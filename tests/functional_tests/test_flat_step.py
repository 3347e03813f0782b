# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The offloaded step in buckets against Core's own, tensor by tensor: the same bits, whatever a run does."""

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from tests.rigs.hybrid_runs import RUNS, differing_states, states_after_steps
from tests.rigs.ranks import run_on_ranks


def _compared(run: str, *, aware: bool, overlap: bool) -> tuple[int, list[str]]:
    """How often a bucket was stepped on as one, and in what the bits are not Core's."""
    from megatron.bridge.core_repairs import install, master_lookup, offload_step, state_device
    from megatron.bridge.offload_engine.bucket import Bucket

    of_run = RUNS[run]
    core = install._repaired_class(HybridDeviceOptimizer, (*master_lookup.REPAIRS, *state_device.REPAIRS))
    entered, step_lists = [], Bucket.step_lists
    Bucket.step_lists = lambda bucket: entered.append(bucket) or step_lists(bucket)
    torch.set_num_threads(2)
    try:
        expected = states_after_steps(core, of_run, aware=aware, overlap=overlap)
        ours = install._repaired_class(core, offload_step.REPAIRS[:1])
        found = states_after_steps(ours, of_run, aware=aware, overlap=overlap)
    finally:
        torch.set_num_threads(1)
        Bucket.step_lists = step_lists
    return len(entered), differing_states(expected, found)


@pytest.mark.parametrize("overlap", [False, True], ids=["serial", "overlap"])
@pytest.mark.parametrize("aware", [False, True], ids=["default", "precision-aware"])
def test_the_bits_are_those_of_cores_own_step(aware, overlap):
    for name, run in RUNS.items():
        ((flat_steps, differing),) = run_on_ranks(_compared, 1, name, aware=aware, overlap=overlap)
        assert (flat_steps, differing) == (run.flat_steps, []), name


def _pinned_slab() -> tuple[bool, bool, float]:
    """Whether a slab's tensors and its run are pinned, and what a copy to the device and back changes."""
    from megatron.bridge.offload_engine.host_memory import Slab
    from megatron.bridge.utils.device import current_device

    slab = Slab([torch.Size([1000]), torch.Size([64])], pinned=True)
    values = torch.randn(1000, device=current_device())
    slab.tensors[0].copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    return slab.tensors[1].is_pinned(), slab.run(0, 1).is_pinned(), float((slab.tensors[0] - values.cpu()).abs().max())


@pytest.mark.gpu
def test_memory_of_exact_size_is_pinned():
    assert run_on_ranks(_pinned_slab, 1) == [(True, True, 0.0)]
