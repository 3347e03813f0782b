# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Timers as they are shown: means of a step, over the ranks that `timing_log_option` names."""

import logging
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.training.config import LoggerConfig
from megatron.bridge.training.monitoring import step_times
from megatron.bridge.training.monitoring.step_times import StepTimes, phases_timed, timed
from megatron.bridge.training.state import GlobalState


class _Clock:
    """A timer of Core's that took a known time."""

    def __init__(self, seconds):
        self.seconds = seconds

    def elapsed(self, reset):
        self.seconds, seconds = 0.0 if reset else self.seconds, self.seconds
        return seconds


def _context(step, timers):
    state = SimpleNamespace(
        train_state=SimpleNamespace(step=step),
        derived=SimpleNamespace(train_iters=4),
        timers=SimpleNamespace(_timers={name: _Clock(seconds) for name, seconds in timers.items()}),
    )
    return SimpleNamespace(state=state, taken_step=SimpleNamespace(seconds=0.5), figures={})


SHOWN = {
    "max": "slowest rank: interval 500.00, optimizer 30.00, save-checkpoint 2000.00",
    "minmax": "fastest to slowest rank: interval 500.00 to 500.00, optimizer 10.00 to 30.00, save-checkpoint 2000.00 "
    "to 2000.00",
    "all": "each rank: interval 500.00 500.00, optimizer 10.00 30.00, save-checkpoint 2000.00 2000.00",
}


@pytest.mark.parametrize("option", SHOWN)
def test_times_are_means_of_a_step_over_the_ranks_that_are_asked_for(option, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    other = {"optimizer": 3.0}  # this rank's optimizer takes a third of it
    monkeypatch.setattr(
        step_times,
        "all_gathered",
        lambda own: [own, {name: seconds * other.get(name, 1) for name, seconds in own.items()}],
    )
    times = StepTimes(
        LoggerConfig(
            timing_log_level=1,
            timing_log_option=option,
            log_interval=3,
            log_timers_to_tensorboard=True,
            tensorboard_log_interval=2,
        )
    )
    figures = []
    for step, timers in ((2, {"optimizer": 0.005}), (3, {"optimizer": 0.015, "save-checkpoint": 2.0, "idle": 0.0})):
        context = _context(step, timers)
        times.on_train_step_end(context)
        figures.append(context.figures)
    assert figures == [{"timers/interval": 0.5, "timers/optimizer": pytest.approx(0.015)}, {}]
    assert caplog.messages == [f"times up to step 3, in ms of a step or an occasion, {SHOWN[option]}"]


def _parts():
    config = SimpleNamespace(barrier_with_L1_time=True, timers=None)
    return config, SimpleNamespace(
        config=SimpleNamespace(timers=None), is_stub_optimizer=False, optimizer=torch.optim.SGD([torch.ones(1)])
    )


@pytest.mark.parametrize(("level", "timed_phases"), [(0, []), (1, ["mine"]), (2, ["mine", "often"])])
def test_a_phase_above_the_level_is_not_timed_and_core_times_only_within_a_step(level, timed_phases):
    state = GlobalState(
        SimpleNamespace(logger=LoggerConfig(timing_log_level=level, barrier_with_L1_time=False))  # type: ignore
    )
    config, optimizer = _parts()
    with phases_timed(state, config, optimizer):
        assert [one.timers is state.timers for one in (config, optimizer.config)] == [bool(level)] * 2
        assert config.barrier_with_L1_time is (not level)
    assert config.timers is optimizer.config.timers is None and config.barrier_with_L1_time
    from megatron.bridge.utils.device import choose_device, enter_device

    enter_device(choose_device("cpu"))
    with timed(state, "mine", 1), timed(state, "often", 2):
        pass
    for _ in range(2):  # after an error the timer starts again
        with pytest.raises(FloatingPointError), timed(state, "mine", 1):
            raise FloatingPointError
    assert list(state.timers._timers) == timed_phases
