# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Memory as it is shown, and names of statistics that there aren't."""

import logging

import pytest
import torch

from megatron.bridge.training.config import LoggerConfig
from megatron.bridge.training.monitoring import memory_figures
from megatron.bridge.training.monitoring.memory_figures import check_memory_keys, log_memory, memory_values
from megatron.bridge.utils.device import choose_device, enter_device


@pytest.fixture(autouse=True)
def _on_the_host():
    enter_device(choose_device("cpu"))


def test_without_a_gpu_it_is_the_resident_memory_of_the_process():
    config = LoggerConfig(memory_keys={"allocated_bytes.all.current": "now"}, log_device_memory_used=True)
    before = memory_values(config)
    held = torch.ones(1 << 24)  # 64 MiB
    after = memory_values(config)
    assert list(before) == ["now", "mem-device-used-bytes"]
    assert held.nbytes * 0.9 < after["now"] - before["now"] < held.nbytes * 1.5
    assert after["now"] < after["mem-device-used-bytes"]


def test_a_statistic_that_there_is_not_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"logger.memory_keys names 'allocated', which .* expected names such as allocated_bytes.all.current",
    ):
        check_memory_keys(LoggerConfig(memory_keys={"allocated": "memory"}))


def test_the_line_shows_each_value_where_it_is_most(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(
        memory_figures,
        "all_gathered",
        lambda own: [{"mem-bytes": 1 << 20, "count": 7}, {"mem-bytes": 3 << 20, "count": 5}],
    )
    log_memory(LoggerConfig(), 4)
    assert caplog.messages == ["memory after step 4, where it is most: mem-bytes 3.0 MiB (rank 1), count 7 (rank 0)"]
