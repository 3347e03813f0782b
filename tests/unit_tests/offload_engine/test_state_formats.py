# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""State in BF16 on the host: its bytes, and the bits of FP32 arithmetic whose results are rounded."""

import itertools

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.offload_engine import piecewise_adam
from megatron.bridge.offload_engine.host_memory import ALIGNMENT
from megatron.bridge.offload_engine.state_formats import StateFormats, keep_state_in
from tests.rigs.hybrid_runs import RUNS, STEPS, differing_states, hybrid_of, seen_of, take_step
from tests.rigs.ranks import run_on_ranks

BF16 = StateFormats(torch.bfloat16, torch.bfloat16, torch.bfloat16)
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.any_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_have_the_bits_of_one_call(monkeypatch, dtype):
    monkeypatch.setattr(piecewise_adam, "PIECE_ELEMENTS", ALIGNMENT)
    options = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(size, generator=generator) for size in (10 * ALIGNMENT, 3 * ALIGNMENT + 17)]
    ours = [master.clone() for master in whole]
    for master in whole:
        master.requires_grad_(True)
    adam = torch.optim.AdamW(whole, fused=True, **options)
    moments = {name: [torch.zeros_like(master, dtype=dtype) for master in ours] for name in MOMENTS}
    counters = [torch.zeros(()) for _ in ours]
    for _ in range(3):
        gradients = [torch.randn(len(master), generator=generator).to(dtype) for master in ours]
        for master, gradient in zip(whole, gradients, strict=True):
            master.grad = gradient.float()
        adam.step()
        for state in adam.state.values():
            for name in MOMENTS:
                state[name].copy_(state[name].to(dtype))
        lists = {"master": ours, "gradient": gradients, **moments, "step": counters}
        piecewise_adam.step_in_pieces(lists, options)
    for master, mine, *mine_moments in zip(whole, ours, *moments.values(), strict=True):
        assert torch.equal(master, mine)
        for name, moment in zip(MOMENTS, mine_moments, strict=True):
            assert torch.equal(adam.state[master][name], moment.float())


def _hybrid_class():
    from megatron.bridge.core_repairs import install, master_lookup, offload_step, state_device

    repairs = (*master_lookup.REPAIRS, *state_device.REPAIRS, *offload_step.REPAIRS[:1])
    return install._repaired_class(HybridDeviceOptimizer, repairs)


def _round_moments(hybrid):
    """What storing the host's moments in BF16 does to them."""
    for part in hybrid.cpu_optimizers:
        for state, name in itertools.product(part.state.values(), MOMENTS):
            if name in state:
                state[name].copy_(state[name].bfloat16())


def _states(run, formats, *, overlap):
    """What is there after each step, moments in FP32; with FP32 on the host they are rounded after each step."""
    hybrid, seen = hybrid_of(_hybrid_class(), aware=True, overlap=overlap, **run.options), []
    keep_state_in(hybrid, formats)
    for step in range(STEPS):
        take_step(hybrid, step, run.without_gradient if step in (0, 2) else ())
        if formats.are_fp32:
            _round_moments(hybrid)
        if step == 1 and run.after_two_steps:
            run.after_two_steps(hybrid)
            if formats.are_fp32:
                _round_moments(hybrid)
        seen.append({name: value.float() for name, value in seen_of(hybrid).items()})
    return seen


def _apart():
    names = ("plain", "half", "half, reloaded", "moments elsewhere", "counters apart", "no gradient", "maximize")
    return {
        (name, overlap): differing
        for name, overlap in itertools.product(names, (False, True))
        if (
            differing := differing_states(
                _states(RUNS[name], StateFormats(), overlap=overlap), _states(RUNS[name], BF16, overlap=overlap)
            )
        )
    }


def test_a_run_is_that_in_fp32_with_rounded_moments():
    assert run_on_ranks(_apart, 1) == [{}]


def _slab_bytes(formats):
    """Bytes of each kind of host memory, for each element, after a step."""
    hybrid = hybrid_of(_hybrid_class(), aware=True, overlap=False)
    keep_state_in(hybrid, formats)
    take_step(hybrid, 0)
    slabs = {}
    for bucket in hybrid._buckets:
        for name, slab in {**bucket._state, "gradient": bucket._gradients, "master": bucket._masters}.items():
            places = slab._places[-1]
            slabs.setdefault(name, set()).add(len(slab._pages) / places if name != "step" else 4.0)
    return slabs


def test_the_bytes_held_are_those_asked_for():
    full, half = {4.0}, {2.0}
    expected = {"exp_avg": full, "exp_avg_sq": full, "gradient": full, "master": full, "step": full}
    assert run_on_ranks(_slab_bytes, 1, StateFormats()) == [expected]
    for name in (*MOMENTS, "gradient"):
        assert run_on_ranks(_slab_bytes, 1, StateFormats(**{name: torch.bfloat16})) == [{**expected, name: half}]


def _refusals():
    stepped = hybrid_of(_hybrid_class(), aware=True, overlap=False)
    take_step(stepped, 0)
    said = []
    for hybrid in (hybrid_of(HybridDeviceOptimizer, aware=True, overlap=False), stepped):
        try:
            keep_state_in(hybrid, BF16)
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_an_optimizer_that_cannot_is_refused():
    ((core, stepped),) = run_on_ranks(_refusals, 1)
    assert "HybridDeviceOptimizer doesn't step in buckets with this megatron-core; set optimizer.exp_avg_dtype" in core
    assert stepped == "an optimizer's formats can't change after its first step"
