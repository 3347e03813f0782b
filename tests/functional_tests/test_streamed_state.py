# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""State that is streamed through the device: the bits of the device's own kernel, whatever order streams allow.

The device's kernel is another one here than the host's, as on a GPU. The reference is a hybrid that offloads nothing.
"""

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from tests.functional_tests.test_device_step import FusedAdam
from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import ORDERS
from tests.rigs.hybrid_runs import RUNS, Run, states_after_steps
from tests.rigs.ranks import run_on_ranks

IN_THE_FIRST_GROUP = tuple(f"{at} " for at in range(7))
"""How names of what belongs to parameters of `hybrid_runs`'s first group, which is its first bucket, begin."""


class OtherAdamW(torch.optim.AdamW):
    """A kernel whose bits can't be mistaken for those of torch's on the host."""

    def step(self, closure=None):
        for param in (param for group in self.param_groups for param in group["params"] if param.grad is not None):
            param.grad = param.grad * 1.5
        super().step(closure)


class CountingAdam(FusedAdam):
    """AdamW that counts in its groups; it takes the options of a hybrid's groups, and parameters without gradient."""

    def __init__(self, params):
        super().__init__(params)

    def step(self, closure=None):
        groups = [list(group["params"]) for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [param for param in group["params"] if param.grad is not None]
        super().step(closure)
        for group, params in zip(self.param_groups, groups, strict=True):
            group["params"] = params


DEVICE_KERNELS = {"torch's": OtherAdamW, "counts in its groups": CountingAdam}


def _states(run: Run, *, adam: type, streamed: float | None, aware: bool, overlap: bool) -> list[dict[str, Any]]:
    """What is there after each step of a run; `streamed` None: without offload, 0: stepped on by the host."""
    from megatron.bridge.core_repairs import gradient_wait, master_lookup, offload_step, state_device
    from megatron.bridge.offload_engine.streamed_step import StreamedStep

    repairs = (*master_lookup.REPAIRS, *state_device.REPAIRS, *offload_step.REPAIRS[:1], *gradient_wait.REPAIRS)
    base: Any = functools.reduce(lambda base, repair: repair.subclass(base), repairs, HybridDeviceOptimizer)
    hybrid = type("Streamed", (StreamedStep, base), {"streamed_fraction": streamed or 0.0})
    options = {**run.options, "gpu_optimizer_cls": adam, "fraction": 0.0 if streamed is None else 1.0}
    return states_after_steps(hybrid, run._replace(options=options), aware=aware, overlap=overlap)


def _apart(found: list[dict], expected: list[dict], prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """Which weights, masters and moments are not those expected, of the parameters whose names begin so."""
    return [
        f"step {step}: {name}"
        for step, (one, other) in enumerate(zip(found, expected, strict=True))
        for name in one
        if name.startswith(prefixes) and not name.endswith("step") and not torch.equal(one[name], other[name])
    ]


def _compared(name: str, kernel: str, *, aware: bool, overlap: bool, orders: tuple) -> dict[Any, Any]:
    """What differs from the run without offload, by the order of what ran ("": at once), pieces being small."""
    of_run, kind = RUNS[name], {"adam": DEVICE_KERNELS[kernel], "aware": aware, "overlap": overlap}
    expected, by_host = (_states(of_run, streamed=streamed, **kind) for streamed in (None, 0.0))
    assert _apart(by_host, expected), "the two kernels round alike"
    with mock.patch("megatron.bridge.offload_engine.streamed_state.PIECE_ELEMENTS", 1024):
        apart = {"": _apart(_states(of_run, streamed=1.0, **kind), expected)}
        half = _states(of_run, streamed=0.5, **kind)
        apart["half"] = _apart(half, expected, IN_THE_FIRST_GROUP)
        apart["half, on the host"] = _apart(half, by_host, ("7 ", "8 ", "9 "))
        for order in orders:
            with adversarial_streams(order):
                apart[order] = _apart(_states(of_run, streamed=1.0, **kind), expected)
    return {of: len(names) for of, names in apart.items() if names}


def _all_compared(names: tuple[str, ...], kernel: str, **kind: Any) -> dict[str, dict]:
    found = {name: _compared(name, kernel, **kind) for name in names}
    return {name: apart for name, apart in found.items() if apart}


@pytest.mark.parametrize("aware", [False, True], ids=["default", "precision-aware"])
def test_the_bits_are_those_without_offload_in_any_order(aware):
    kind = {"aware": aware, "overlap": aware, "orders": ORDERS}
    assert run_on_ranks(_all_compared, 1, ("reloaded", "moments elsewhere"), "torch's", **kind) == [{}]


def test_gradients_that_come_and_go_and_kernels_that_count_in_their_groups():
    kind = {"overlap": False, "orders": ()}
    assert run_on_ranks(_all_compared, 1, ("counters apart",), "torch's", aware=True, **kind) == [{}]
    assert run_on_ranks(_all_compared, 1, ("plain",), "counts in its groups", aware=False, **kind) == [{}]
    assert run_on_ranks(_without_gradients, 1) == [{}]


def _without_gradients() -> dict[str, list[str]]:
    """As `_compared`, without the host: it steps on old gradients where there are none, as Core does."""
    kind = {"adam": OtherAdamW, "aware": False, "overlap": True}
    expected, found = (_states(RUNS["no gradient"], streamed=streamed, **kind) for streamed in (None, 1.0))
    apart = _apart(found, expected)
    return {"no gradient": apart} if apart else {}


def _refused(**options: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        _states(RUNS["plain"]._replace(options=options), adam=OtherAdamW, streamed=1.0, aware=False, overlap=False)
    return str(refusal.value)


def test_state_of_another_form_is_refused():
    assert "set optimizer.optimizer_streamed_fraction=0" in run_on_ranks(_refused, 1, amsgrad=True)[0]
