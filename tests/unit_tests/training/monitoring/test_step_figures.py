# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Throughput and perplexity, computed by hand."""

import math
from collections import deque
from types import SimpleNamespace

import pytest

from megatron.bridge.checkpoint.iterations import write_tracker
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.monitoring import energy
from megatron.bridge.training.monitoring.step_figures import (
    PROGRESS_FILE,
    ProgressFile,
    build_step_figures,
    tflops_per_device,
)
from megatron.bridge.training.monitoring.trackers import perplexity
from tests.rigs.config_examples import make_config
from tests.rigs.ranks import run_on_ranks


def test_throughput_is_the_work_of_all_steps_by_their_time():
    assert tflops_per_device(deque([(2e12, 1.0), (6e12, 3.0)]), 4) == pytest.approx(0.5)


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(7), 7.0), (900.0, math.exp(20))])
def test_perplexity_stays_a_number(loss, expected):
    assert perplexity(loss) == pytest.approx(expected)


def test_the_progress_file_names_the_step_of_the_checkpoint_not_of_the_run(tmp_path):
    write_tracker(tmp_path, 3)  # in the background, while the run trained
    train_state = SimpleNamespace(step=6, floating_point_operations_so_far=2e12, consumed_train_samples=12)
    state = SimpleNamespace(train_state=train_state, derived=SimpleNamespace(world_size=1))
    ProgressFile(tmp_path).on_checkpoint_save(SimpleNamespace(state=state))
    assert "Saved checkpoint\tStep: 3\t" in (tmp_path / PROGRESS_FILE).read_text()


def test_energy_and_attention_logits_are_refused_by_name_where_nothing_counts_them():
    with pytest.raises(ValueError, match=r"^logger.log_energy=true: .*; it needs a GPU that counts its energy"):
        build_step_figures(make_config("logger.log_energy=true"))
    with pytest.raises(ValueError, match=r"^logger.log_max_attention_logit=true needs Transformer Engine's attention"):
        build_step_figures(make_config("logger.log_max_attention_logit=true"))


def test_core_is_told_to_keep_the_logits():
    cfg = make_config("logger.log_max_attention_logit=true")
    runtime_config_update(cfg)
    assert cfg.model.log_max_attention_logit


def _measured(readings):
    """What one rank of two shows of energy, from what its device's counter says."""
    import torch.distributed as dist

    own = readings[dist.get_rank()]
    counter = SimpleNamespace(joules=lambda: own.pop(0))
    energy.EnergyCounter = lambda: counter  # no machine here has one
    figure = energy.Energy()
    figure._at -= 10
    for _ in range(2):
        figure.count_step()
    return figure.read()


def test_energy_is_a_mean_over_devices_and_steps():
    for found in run_on_ranks(_measured, 2, [[100.0, 500.0, 500.0], [0.0, 1200.0, 1200.0]]):
        assert found["energy_joules_per_device"] == 400.0
        assert found["power_watts_per_device"] == pytest.approx(80.0, rel=0.02)
