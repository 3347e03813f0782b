# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gradients that cross as they are reduced: what waits for what, and the factors that the host repeats."""

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs import master_lookup, offload_step
from megatron.bridge.offload_engine.host_memory import Slab
from megatron.bridge.offload_engine.overlap import early_gradients
from megatron.bridge.offload_engine.overlap.arrivals import Arrivals
from megatron.bridge.offload_engine.overlap.connect import gradients_cross_early
from megatron.bridge.offload_engine.overlap.early_gradients import EarlyGradients, Planned
from megatron.bridge.offload_engine.overlap.hybrid import OverlappedStep
from megatron.bridge.offload_engine.unfinished_gradients import UnfinishedGradients
from megatron.bridge.utils import device
from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import DEFAULT_FIRST, HOST_FIRST, SIDES_FIRST
from tests.rigs.hybrid_runs import hybrid_of, params_of
from tests.rigs.late_worker import LateWorker


class _Buffer:
    """In place of DDP's."""

    def scale_gradients(self, factor):
        for weight in self.weights:
            weight.main_grad.mul_(factor)


class _Group(_Buffer):
    """In place of DDP's group of buckets."""

    ddp_config = SimpleNamespace(overlap_param_gather=False, reduce_scatter_with_fp32_accumulation=False)
    grad_reduce_handle = param_gather_handle = None

    def start_grad_sync(self):
        """Nothing is to be reduced."""

    finish_grad_sync = reset = start_param_sync = start_grad_sync


class _Part(SimpleNamespace):
    """In place of a distributed optimizer."""

    __hash__ = object.__hash__

    def copy_to_weights(self, shards):
        """They are the weights."""

    def _get_model_param_range_map(self, weight):
        return {"param": SimpleNamespace(start=0, end=weight.numel())}


@contextlib.contextmanager
def _rig(order):
    """(hybrid optimizer, its gradients' crossing, DDP's group, DDP's buffer) on adversarial streams."""
    device.enter_device()
    with adversarial_streams(order):
        repairs = (*master_lookup.REPAIRS, *offload_step.REPAIRS[:1])
        base = functools.reduce(lambda cls, repair: repair.subclass(cls), repairs, HybridDeviceOptimizer)
        overlapped = type("Overlapped", (OverlappedStep, base), {"worker": LateWorker(HOST_FIRST)})
        hybrid = hybrid_of(overlapped, aware=False, overlap=True)
        group, buffer = _Group(), _Buffer()
        weights = group.weights = buffer.weights = params_of(hybrid)
        for weight in weights:
            weight.main_grad = torch.zeros_like(weight)
        group.buckets = [SimpleNamespace(params=set(weights), params_list=weights)]
        config = SimpleNamespace(clip_grad=1.0, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
        part = _Part(optimizer=hybrid, config=config, weight_of={weight: weight for weight in weights})
        part.buffers, part.model_param_gbuf_map = [buffer], {weight: (0, None, None) for weight in weights}
        chunk = SimpleNamespace(bucket_groups=[group], buffers=[buffer], config=SimpleNamespace())
        chunk.expert_parallel_bucket_groups = chunk.expert_parallel_buffers = []
        plan = {of: Planned(part, *of.buckets) for of in vars(hybrid)["cpu_optimizers"]}
        for planned in plan.values():
            planned.groups = {group}
        arrivals = Arrivals([chunk])
        with mock.patch.object(early_gradients, "plan_of", lambda *_: (plan, "")):
            hybrid.early = EarlyGradients(arrivals, [part], [chunk])
            hybrid.early.take_step = lambda: (hybrid.step(), arrivals.expect(part, hybrid.crossings))
            with gradients_cross_early(SimpleNamespace(early=hybrid.early)):
                yield hybrid, hybrid.early, group, buffer


def _write(weights, value):
    for weight in weights:
        weight.main_grad.fill_(value)


def _values(early):
    """What is on the host."""
    found = set()
    for crossed in early._crossed.values():
        crossed.event.synchronize()
        for tensor in crossed.unfinished.slab.tensors:
            found.update(tensor.tolist())
    return found


def test_they_cross_once_they_are_there():
    with _rig(HOST_FIRST) as (_, early, group, _buffer):
        _write(group.weights, 3.0)
        group.finish_grad_sync()
        assert _values(early) == {3.0}


def test_they_cross_once_another_stream_has_reduced_them():
    with _rig(HOST_FIRST) as (_, early, group, _buffer):
        side = device.new_stream()
        _write(group.weights, 3.0)
        device.start_after_current(side)
        with device.on_stream(side):
            group.scale_gradients(2.0)
        early.is_reduced(group, SimpleNamespace(wait=lambda: device.wait_for_stream(side)))
        assert _values(early) == {6.0}


def test_they_cross_before_they_are_scaled():
    with _rig(DEFAULT_FIRST) as (_, early, group, buffer):
        _write(group.weights, 3.0)
        group.finish_grad_sync()
        buffer.scale_gradients(0.5)
        assert _values(early) == {3.0}
        (factors,) = {tuple(early_gradients._factors(crossed)) for crossed in early._crossed.values()}
        assert factors == (0.5,)


def test_they_wait_for_the_step_that_reads_those_before():
    with _rig(HOST_FIRST) as (hybrid, early, group, _buffer):
        for value in (3.0, 4.0):
            _write(group.weights, value)
            group.finish_grad_sync()
            assert not hybrid.worker._tasks
            for weight in group.weights:
                weight.grad = weight.main_grad.clone()
            early.norm_is_taken(torch.tensor(0.5))
            early.take_step()
            assert hybrid.worker._tasks
            group.reset()
        hybrid.finish()


def test_weights_return_once_the_backward_pass_has_read_them():
    without_check = mock.patch.object(early_gradients, "NUM_CHECKED_STEPS", 0)  # it waits
    with _rig(SIDES_FIRST) as (hybrid, early, group, _buffer), without_check:
        before = [weight.cpu() for weight in group.weights]
        _write(group.weights, 3.0)
        group.finish_grad_sync()
        read = [weight.clone() for weight in group.weights]  # as layers do whose backward pass comes later
        for weight in group.weights:
            weight.grad = weight.main_grad.clone()
        early.norm_is_taken(0.5)
        early.take_step()
        hybrid.finish()
        for weight, seen, value in zip(group.weights, read, before, strict=True):
            assert torch.equal(seen.cpu(), value) and not torch.equal(weight.cpu(), value)


def test_in_a_loop_that_does_not_ask_for_it_they_cross_in_the_step():
    with _rig(HOST_FIRST) as (_, early, group, _buffer):
        with gradients_cross_early(SimpleNamespace(early=early)):
            pass
        group.finish_grad_sync()
        assert not early._crossed


def test_what_changed_in_another_way_crosses_again_and_is_logged(caplog):
    with _rig(HOST_FIRST) as (hybrid, early, group, _buffer):
        _write(group.weights, 3.0)
        group.finish_grad_sync()
        for weight in group.weights:
            weight.grad = torch.full_like(weight, 5.0)
        early.norm_is_taken(0.5)
        assert not early._crossed and all(weight.grad is not None for weight in group.weights)
        early.take_step()
        hybrid.finish()
        assert "gradients change between their reduction and the step" in caplog.text
        group.reset()
        group.finish_grad_sync()
        assert not early._crossed


@pytest.mark.any_core
@pytest.mark.parametrize("in_fp32", [False, True], ids=["in their format", "widened first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_multiplies_as_core_does(dtype, in_fp32, stored_as):
    from megatron.core.utils import local_multi_tensor_scale

    slab = Slab([torch.Size([1000])], dtype=dtype)
    slab.tensors[0].copy_(torch.randn(1000, generator=torch.Generator().manual_seed(1)))
    expected = slab.tensors[0].clone().to(torch.float32 if in_fp32 else dtype)
    unfinished = UnfinishedGradients(slab, in_fp32=in_fp32, stored_as=stored_as)
    unfinished.factors = [1 / 3, 0.0712345678901234]
    for factor in unfinished.factors:
        local_multi_tensor_scale(0, None, [[expected], [expected]], factor)
    assert torch.equal(unfinished.scaled(slab.tensors[0]), expected)
    found = unfinished.finish(slab.tensors[0], torch.empty(1000))
    assert torch.equal(found, expected.to(stored_as).float())
