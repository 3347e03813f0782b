# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The offloaded step where streams and events order only what they promise: the same bits, or a wait is missing."""

import functools
import inspect
import sys
import textwrap
from typing import Any
from unittest import mock

import pytest
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.offload_engine.overlap import worker
from megatron.bridge.offload_engine.overlap.hybrid import OverlappedStep
from tests.rigs.adversarial_streams import adversarial_streams
from tests.rigs.device_queues import DEFAULT_FIRST, HOST_FIRST, ORDERS, SIDES_FIRST
from tests.rigs.hybrid_runs import RUNS, differing_states, states_after_steps
from tests.rigs.ranks import run_on_ranks
from tests.rigs.sync import Cell, Model
from tests.rigs.sync_matrix import run_cells


def _class_of_runs(*, in_buckets: bool, waits: bool, overlapped: bool) -> type:
    """Core's class with what its loads need, and the step in buckets and the wait for gradients where asked for.

    Overlapped, it returns early.

    A new class each time: torch wraps a class's `step` once, whatever it is replaced by later.
    """
    from megatron.bridge.core_repairs import gradient_wait, master_lookup, offload_step, state_device

    repairs = (*master_lookup.REPAIRS, *state_device.REPAIRS)
    repairs += offload_step.REPAIRS[:1] if in_buckets else ()
    repairs += gradient_wait.REPAIRS if waits else ()
    cls = functools.reduce(lambda base, repair: repair.subclass(base), repairs, HybridDeviceOptimizer)
    return type("Overlapped", (OverlappedStep, cls), {"worker": worker.HostWorker(None)}) if overlapped else cls


def _apart(
    run: str, *, aware: bool, overlap: bool, in_buckets: bool = True, waits: bool = True, overlapped: bool = False
) -> dict[Any, int]:
    """How many tensors differ from those of the ordinary accelerator, by the order of what ran; all that do."""
    of_run, kind = RUNS[run], {"aware": aware, "overlap": overlap}
    of_class = {"in_buckets": in_buckets, "waits": waits}
    expected = states_after_steps(_class_of_runs(**of_class, overlapped=False), of_run, **kind)
    apart = {}
    for order in ORDERS:
        with adversarial_streams(order):
            found = states_after_steps(_class_of_runs(**of_class, overlapped=overlapped), of_run, **kind)
        if differing := differing_states(expected, found):
            apart[order] = len(differing)
    return apart


def _all_apart(runs: tuple[str, ...], **kind: bool) -> dict[str, dict[Any, int]]:
    found = {run: _apart(run, **kind) for run in runs}
    return {run: apart for run, apart in found.items() if apart}


UNLIKE = ("half, reloaded", "no gradient", "moments elsewhere")
"""The runs that differ in what is copied, and when."""


@pytest.mark.parametrize("overlap", [False, True], ids=["serial", "overlap"])
@pytest.mark.parametrize("aware", [False, True], ids=["default", "precision-aware"])
def test_the_step_in_buckets_waits_for_all_it_needs(aware, overlap):
    assert run_on_ranks(_all_apart, 1, UNLIKE, aware=aware, overlap=overlap) == [{}]


@pytest.mark.parametrize("aware", [False, True], ids=["default", "precision-aware"])
def test_the_overlapped_step_waits_for_all_it_needs(aware):
    kind = {"aware": aware, "overlap": True, "overlapped": True}
    assert run_on_ranks(_all_apart, 1, UNLIKE, **kind) == [{}]


CORES_WAITS = {
    "gradients are there before they are copied": (
        "step",
        "self._d2h_stream.wait_stream(torch.cuda.current_stream())",
    ),
    "the host steps once they are copied": ("step", "d2h_event.synchronize()"),
    "weights are read once they are there": (
        "_register_param_copy_back_gpu_hook",
        "self._h2d_stream.record_event().wait(torch.cuda.current_stream())",
    ),
}


def _core_apart() -> dict[str, dict[Any, int]]:
    """Core's own step as it is, repaired, and without each of its waits."""
    kind = {"aware": True, "overlap": True, "in_buckets": False}
    apart = {"as it is": _apart("half", waits=False, **kind), "repaired": _apart("half", **kind)}
    for what, (method, line) in CORES_WAITS.items():
        function = inspect.unwrap(getattr(HybridDeviceOptimizer, method))
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(line) == 1, f"Core's {method} has changed: {line!r}"
        namespace: dict[str, Any] = {}
        exec(source.replace(line, "pass"), sys.modules[function.__module__].__dict__, namespace)
        with mock.patch.object(HybridDeviceOptimizer, method, namespace[method]):
            apart[what] = _apart("half", **kind)
    return apart


def test_what_core_waits_for_and_does_not_is_seen():
    (apart,) = run_on_ranks(_core_apart, 1)
    assert apart.pop("repaired") == {}
    assert DEFAULT_FIRST in apart.pop("as it is")  # its device's part doesn't wait for its gradients
    assert len(apart) == len(CORES_WAITS) and all(apart.values()), apart


CELLS = [  # a few of those that `make test-streams` runs
    Cell(Model("bf16", "dense"), precision_aware=False, fraction=1.0, overlap=False),
    Cell(Model("bf16", "experts"), precision_aware=True, fraction=0.5, overlap=True),
    Cell(Model("fp16", "dense"), precision_aware=False, fraction=0.5, overlapped_step=True),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_runs_load_sync_and_step_the_same(cell, written_model):
    ways = ["running process", "pretrained checkpoint"]
    for order in (HOST_FIRST, DEFAULT_FIRST, SIDES_FIRST):
        for verdicts in run_on_ranks(run_cells, 2, written_model(cell.model, 2), [cell], ways, order):
            assert set(verdicts[str(cell)].values()) == {"passed"}, (order, verdicts)
