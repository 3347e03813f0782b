# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Measurements of the machine: all there, and each rank has the worst of all."""

from dataclasses import astuple
from unittest import mock

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
