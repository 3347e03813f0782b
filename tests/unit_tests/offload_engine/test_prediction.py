# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The prediction of an optimizer's time: each term by hand, for a billion parameters on one H200's ceilings."""

from dataclasses import replace

import pytest

from megatron.bridge.offload_engine.ceilings import ASSUMED
from megatron.bridge.offload_engine.prediction import Demand, Placement, predict_seconds, reckon
from megatron.bridge.offload_engine.step import BUCKET_ELEMENTS

pytestmark = pytest.mark.any_core

ALL_ON_THE_HOST, ALL_STREAMED = Placement(1.0, 0.0), Placement(1.0, 1.0)
IN_A_ROW = Demand(10**9, 1e12)
COPIES_OVERLAP = replace(IN_A_ROW, overlaps=True)
A_BUCKET = 4 * BUCKET_ELEMENTS / 55e9


def seconds(demand, placement=ALL_ON_THE_HOST):
    return predict_seconds(ASSUMED, demand, placement)


def close_to(value):
    return pytest.approx(value, rel=0.005)


def test_nothing_offloaded_takes_the_device_alone():
    assert seconds(IN_A_ROW, Placement(0.0, 0.0)) == close_to(1 / 120)


def test_without_overlap_it_is_three_phases_and_adam_has_the_memory_to_itself():
    assert seconds(IN_A_ROW) == close_to(4 / 55 + 1 / 4.1 + 4 / 55)
    assert seconds(IN_A_ROW, Placement(0.5, 0.0)) == close_to((4 / 55 + 1 / 4.1 + 4 / 55) / 2)


def test_copies_beside_adam_leave_a_bucket_at_either_end():
    assert seconds(COPIES_OVERLAP) == close_to(1 / 3.6 + 2 * A_BUCKET)


def test_streamed_state_fills_the_link_both_ways():
    assert seconds(COPIES_OVERLAP, ALL_STREAMED) == close_to(24 / 91 + 3 * A_BUCKET)


def test_a_step_beside_the_next_forward_pass_is_shorter_by_that_pass():
    beside = replace(COPIES_OVERLAP, forward_seconds=0.1)
    hidden = 0.1 * (1 - BUCKET_ELEMENTS / 10**9)  # the last layer waits for the last bucket
    assert seconds(beside) == close_to(1 / 3.6 + 2 * A_BUCKET - hidden)
    long = replace(beside, forward_seconds=10.0)
    assert seconds(long) == close_to(4 / 55)  # what is left: all gradients cross before the pass begins
    assert seconds(replace(long, backward_seconds=0.05)) == close_to(4 / 55 - 0.05)
    assert seconds(replace(long, backward_seconds=10.0)) == close_to(A_BUCKET)


def test_what_the_host_rounds_costs_it_time_and_the_link_less():
    rounding = replace(COPIES_OVERLAP, weight_bytes=2)
    assert seconds(rounding) == close_to(1 / 3.6 + 1 / 10.6 + 1.5 * A_BUCKET)
    assert reckon(ASSUMED, rounding, ALL_ON_THE_HOST).bytes_up == 2e9
    assert reckon(ASSUMED, replace(rounding, gradient_bytes=2), ALL_ON_THE_HOST).bytes_down == 2e9


def test_the_parts_are_what_each_takes_alone():
    parts = reckon(ASSUMED, COPIES_OVERLAP, Placement(0.5, 0.0))
    assert (parts.bytes_down, parts.bytes_up) == (2e9, 2e9)
    assert (parts.down_seconds, parts.up_seconds) == (close_to(2 / 55), close_to(2 / 55))
    assert (parts.host_seconds, parts.device_seconds) == (close_to(0.5 / 3.6), close_to(0.5 / 120))
