# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What an overlapped step sends back, and that whoever looks waits for it."""

import functools
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs import master_lookup, offload_step
from megatron.bridge.offload_engine.overlap.hybrid import OverlappedStep
from megatron.bridge.utils.device import enter_device
from tests.rigs.device_queues import HOST_FIRST
from tests.rigs.hybrid_runs import SIZES, hybrid_of, params_of, take_step
from tests.rigs.late_worker import LateWorker


@pytest.fixture
def hybrid():
    """One in precision-aware mode, after a step that its worker hasn't taken yet."""
    enter_device()
    repairs = (*master_lookup.REPAIRS, *offload_step.REPAIRS[:1])
    base = functools.reduce(lambda cls, repair: repair.subclass(cls), repairs, HybridDeviceOptimizer)
    overlapped = type("Overlapped", (OverlappedStep, base), {"worker": LateWorker(HOST_FIRST)})
    hybrid = hybrid_of(overlapped, aware=True, overlap=True)
    take_step(hybrid, 0)
    return hybrid


def test_masters_cross_in_16_bits_rounded_as_the_device_does(hybrid):
    crossed, copy = [], torch._foreach_copy_

    def recorded(targets, sources, non_blocking=False):
        if non_blocking:  # to the device, not from masters to what crosses
            crossed.extend(source.dtype for source in sources)
        copy(targets, sources, non_blocking=non_blocking)

    with mock.patch.object(torch, "_foreach_copy_", recorded):
        hybrid.finish()
    assert set(crossed) == {torch.bfloat16} and hybrid.num_rounded_bytes == 2 * sum(SIZES)
    for param in params_of(hybrid):
        assert torch.equal(param, hybrid.param_to_inner_param[param].to(torch.bfloat16))


def test_looking_at_the_state_takes_the_step(hybrid):
    assert hybrid.crossings and not vars(hybrid)["state"]
    assert len(hybrid.state) == len(params_of(hybrid)) and not hybrid.crossings


def test_hooks_of_a_step_run_once_whenever_its_class_changed(hybrid):
    base = type(hybrid).__bases__[1]
    changed = hybrid_of(base, aware=True, overlap=True)
    changed.__class__ = type("Changed", (OverlappedStep, base), {"worker": LateWorker(HOST_FIRST)})
    for optimizer in (hybrid, changed):
        calls = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        take_step(optimizer, 1)
        assert calls == ["before", "after"] and optimizer.crossings


def test_a_closure_is_refused(hybrid):
    with pytest.raises(ValueError, match="takes no closure"):
        hybrid.step(lambda: 0.0)
