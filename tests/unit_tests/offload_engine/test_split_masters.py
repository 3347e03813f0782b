# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Masters stored as 16-bit rests: the bits of FP32 masters in each step, and half of their bytes between steps."""

import contextlib
import itertools
import mmap
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.offload_engine import piecewise_adam
from megatron.bridge.offload_engine.host_memory import ALIGNMENT
from megatron.bridge.offload_engine.split_masters import join, split
from megatron.bridge.offload_engine.split_step import split_masters_of
from megatron.bridge.offload_engine.state_formats import StateFormats, keep_state_in
from megatron.bridge.offload_engine.weight_transit import Transit
from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import HOST_FIRST, ORDERS
from tests.rigs.hybrid_runs import RUNS, STEPS, differing_states, hybrid_of, params_of, seen_of, take_step
from tests.rigs.ranks import run_on_ranks

BF16 = StateFormats(torch.bfloat16, torch.bfloat16, torch.bfloat16)
EDGES = (0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF)


def _int32(values):
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)


@pytest.mark.any_core
@pytest.mark.parametrize("low", EDGES)
def test_weight_and_rest_give_back_every_master(low):
    master = _int32((torch.arange(1 << 16) << 16) + low).view(torch.float32)  # NaN and infinities among them
    weight, rest = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    lost = split(master, weight=weight, rest=rest, room=torch.empty_like(master))
    found = torch.empty_like(master)
    join(weight, rest, lost, into=found)
    assert torch.equal(found.view(torch.int32), master.view(torch.int32))
    assert torch.equal(weight.view(torch.int16), master.bfloat16().view(torch.int16))
    is_number = ~master.isnan()
    num_lost = 0 if lost is None else int(is_number[lost[0]].sum())
    assert num_lost == (int(is_number.sum()) // 2 if low == 0x8000 else 0)  # rounded down to even


def _hybrid_class():
    from megatron.bridge.core_repairs import install, master_lookup, offload_step, state_device

    repairs = (*master_lookup.REPAIRS, *state_device.REPAIRS, *offload_step.REPAIRS[:1])
    return install._repaired_class(HybridDeviceOptimizer, repairs)


def _states(run, formats, *, overlap, splits, reads=range(STEPS)):
    """The weights after each step, and all else after those that are named."""
    hybrid, seen = hybrid_of(_hybrid_class(), aware=True, overlap=overlap, **run.options), []
    keep_state_in(hybrid, formats)
    if splits:
        split_masters_of(hybrid)
    for step in range(STEPS):
        take_step(hybrid, step, run.without_gradient if step in (0, 2) else ())
        if step == 1 and run.after_two_steps:
            run.after_two_steps(hybrid)
        weights = {f"{at} weight": param.clone() for at, param in enumerate(params_of(hybrid))}
        if splits and step not in reads and (step != 1 or not run.after_two_steps):
            assert all(bucket.split_masters.is_split for bucket in vars(hybrid)["_buckets"])
        seen.append(seen_of(hybrid) if step in reads else weights)
    return seen


def _apart():
    """In what runs with split masters differ, by run and the order of streams (None: at once)."""
    runs = [
        *itertools.product(("plain", "half, reloaded", "moments elsewhere", "no gradient"), (False,), (None,)),
        *itertools.product(("counters apart", "maximize"), (True,), (None,)),
        *itertools.product(("reloaded",), (True,), ORDERS[:3]),
    ]
    apart = {}
    with mock.patch.object(piecewise_adam, "PIECE_ELEMENTS", 16 * ALIGNMENT):  # several to a bucket
        for (name, overlap, order), formats in itertools.product(runs, (StateFormats(), BF16)):
            if order is not None and formats == BF16:
                continue
            kind = {"overlap": overlap, "reads": (0, 3)}
            expected = _states(RUNS[name], formats, splits=False, **kind)
            with adversarial_streams(order) if order else contextlib.nullcontext():
                found = _states(RUNS[name], formats, splits=True, **kind)
            apart[name, overlap, order] = differing_states(expected, found)
    return {run: differing for run, differing in apart.items() if differing}


def test_a_run_has_the_bits_of_fp32_masters():
    assert run_on_ranks(_apart, 1) == [{}]


def _behaviour(num_elements):
    """Memory that a bucket gives back, and what is said of weights that changed, with and without a sync of masters."""
    from megatron.bridge.utils.device import current_device

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    weight = torch.nn.Parameter(torch.ones(num_elements, dtype=torch.bfloat16, device=current_device()))
    options = {"fused": True, "lr": 1e-3}
    adam = {"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": torch.optim.AdamW}
    hybrid = _hybrid_class()([weight], offload_fraction=1.0, param_update_in_fp32=True, **adam, **options)
    split_masters_of(hybrid)
    weight.grad = torch.ones_like(weight)
    hybrid.step()
    split = resident()
    master = hybrid.param_to_inner_param[weight]
    joined = resident()
    said = []
    for value, syncs in ((3.0, True), (5.0, False)):
        hybrid.step()
        weight.data[5] = value
        master = hybrid.param_to_inner_param[weight]
        if syncs:
            master.data.copy_(weight)
        for use in (hybrid.state_dict, hybrid.step):
            try:
                use()
            except RuntimeError as error:
                said.append(str(error))
    return joined - split, said


@pytest.mark.any_core
def test_memory_is_given_back_and_weights_that_changed_are_seen():
    ((given_back, said),) = run_on_ranks(_behaviour, 1, 1 << 22)
    assert given_back == pytest.approx(2 << 22, rel=0.2)
    assert len(said) == 2  # by a save and by a step
    assert all("weights of the model aren't those that the last step left" in one for one in said)


def _masters_after_a_failed_step():
    """The masters that a script reads after it caught a step's error, and the weights."""
    hybrid = hybrid_of(_hybrid_class(), aware=True, overlap=False)
    split_masters_of(hybrid)
    take_step(hybrid, 0)

    def fail(*_):
        raise MemoryError("of the host")

    hybrid.cpu_optimizers[0].register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        take_step(hybrid, 1)
    masters = [hybrid.param_to_inner_param[param] for param in params_of(hybrid)]
    are_split = [bucket.split_masters.is_split for bucket in vars(hybrid)["_buckets"] if bucket.split_masters]
    pairs = zip(masters, params_of(hybrid), strict=True)
    return are_split, [torch.equal(master.to(param.dtype), param.cpu()) for master, param in pairs]


@pytest.mark.any_core
def test_masters_are_in_fp32_for_who_reads_them_after_a_failed_step():
    ((are_split, are_equal),) = run_on_ranks(_masters_after_a_failed_step, 1)
    assert are_split and not any(are_split) and all(are_equal)


def _said_of_a_queued_change():
    """What a save says where a weight was changed after the step, by work that may not have run yet."""
    said = {}
    for order in ORDERS[:3]:
        with adversarial_streams(order):
            hybrid = hybrid_of(_hybrid_class(), aware=True, overlap=True)
            split_masters_of(hybrid)
            take_step(hybrid, 0)
            params_of(hybrid)[0].data.fill_(3.0)
            with pytest.raises(RuntimeError) as refusal:
                hybrid.state_dict()
            said[order] = str(refusal.value)
    return said


def test_weights_that_a_stream_has_yet_to_change_are_seen():
    (said,) = run_on_ranks(_said_of_a_queued_change, 1)
    assert list(said) == list(ORDERS[:3])
    assert all("weights of the model aren't those that the last step left" in one for one in said.values())


def _is_sent_when_it_grows():
    """Whether a buffer's copy to the device has run once the buffer has other memory."""
    from megatron.bridge.utils import device

    with adversarial_streams(HOST_FIRST):
        transit, weights = Transit(pinned=False), torch.zeros(8, dtype=torch.bfloat16, device=device.current_device())
        transit.stream = stream = device.new_stream()
        buffer = transit.next(8)
        buffer.copy([weights], stream, to_device=True)
        was_sent = stream.here.is_reached
        buffer.reserve(16)
        return was_sent, stream.here.is_reached


@pytest.mark.any_core
def test_a_buffer_keeps_its_memory_until_it_was_sent():
    assert run_on_ranks(_is_sent_when_it_grows, 1) == [(False, True)]


def _refusals():
    said = []
    fp16 = hybrid_of(_hybrid_class(), aware=False, overlap=False)
    vars(fp16)["_buckets"][0].params[0] = fp16._buckets[0].params[0].half()
    for hybrid in (hybrid_of(HybridDeviceOptimizer, aware=True, overlap=False), fp16):
        with pytest.raises(RuntimeError) as refusal:
            split_masters_of(hybrid)
        said.append(str(refusal.value))
    return said


def test_an_optimizer_that_cannot_is_refused():
    ((core, fp16),) = run_on_ranks(_refusals, 1)
    assert "HybridDeviceOptimizer of this megatron-core doesn't step in buckets: set optimizer.optimizer_split" in core
    assert "torch.float16" in fp16 and "BF16 is needed; set optimizer.optimizer_split_masters=false" in fp16
