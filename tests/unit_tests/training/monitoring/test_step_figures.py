# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Throughput and perplexity, computed by hand."""

import math
from collections import deque

import pytest

from megatron.bridge.training.monitoring.step_figures import tflops_per_device
from megatron.bridge.training.monitoring.trackers import perplexity


def test_throughput_is_the_work_of_all_steps_by_their_time():
    assert tflops_per_device(deque([(2e12, 1.0), (6e12, 3.0)]), 4) == pytest.approx(0.5)


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(7), 7.0), (900.0, math.exp(20))])
def test_perplexity_stays_a_number(loss, expected):
    assert perplexity(loss) == pytest.approx(expected)
