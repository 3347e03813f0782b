# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Measurements of the machine: all there, and each rank has the worst of all."""

from dataclasses import astuple
from unittest import mock

import torch

from tests.rigs.adversarial_streams import adopted, adversarial_streams
from tests.rigs.device_queues import HOST_FIRST
from tests.rigs.ranks import run_on_ranks


def _measured() -> tuple[float, ...]:
    from megatron.bridge.offload_engine import ceilings
    from megatron.bridge.offload_engine.host_threads import plan_host_threads
    from megatron.bridge.utils.device import enter_device

    enter_device()
    with mock.patch.object(ceilings, "ELEMENTS", 1 << 14):
        alone = ceilings.measure_ceilings(plan_host_threads(1))
        slower = ceilings.Ceilings(*(one / 2 for one in astuple(alone)))
        with mock.patch.object(ceilings, "all_gathered", lambda own: [own, astuple(slower), own]):
            worst = ceilings.measure_ceilings(None)
    assert min(astuple(alone)) > 0 and "Adam" in str(alone)
    return tuple(own <= other for own, other in zip(astuple(worst), astuple(slower), strict=True))


def test_every_rank_has_the_worst_of_all():
    assert run_on_ranks(_measured, 1) == [(True,) * 7]


def _under_way() -> dict[str, set[int]]:
    """How many copies are under way when a measurement of the device or the host begins, ends, and is over."""
    from megatron.bridge.offload_engine import ceilings

    side, found = torch.cuda.Stream(), {}
    for what in ("device", "host"):
        with adversarial_streams(HOST_FIRST):
            source, target, seen = torch.ones(2, device="cuda"), torch.zeros(2, device="cpu"), []

            def copy(source=source, target=target):
                with torch.cuda.stream(side):
                    target.copy_(source, non_blocking=True)

            def look(seen=seen):
                seen.append(len(adopted(side).tasks))
                return 0.0

            copy()
            with mock.patch.object(ceilings.time, "perf_counter", look):
                ceilings._seconds(*((copy,) if what == "device" else (lambda: None, copy)))
            look()
        found |= {f"{what} begins": set(seen[:-1:2]), f"{what} ends": set(seen[1:-1:2]), f"{what} is over": {seen[-1]}}
    return found


def test_a_measurement_begins_and_ends_where_nothing_else_is_under_way():
    (found,) = run_on_ranks(_under_way, 1)
    assert (found.pop("host begins"), found.pop("host ends")) == ({8}, {8})  # beside the host's work
    assert set(map(frozenset, found.values())) == {frozenset({0})}
