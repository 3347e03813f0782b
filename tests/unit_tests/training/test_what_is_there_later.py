# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run's objects hold from some moment on, asked for before."""

import pytest

from megatron.bridge.training.callbacks import CallbackContext
from megatron.bridge.training.state import GlobalState
from tests.rigs.config_examples import make_config


def test_what_follows_from_the_configuration_is_there_after_setup():
    state = GlobalState(make_config())
    with pytest.raises(RuntimeError, match="the run isn't set up"):
        _ = state.derived
    state.derived = derived = state.cfg.derive(world_size=1)
    assert state.derived is derived


def test_a_step_is_there_once_all_its_figures_are():
    context = CallbackContext(GlobalState(make_config()), [], loss_dict={"lm loss": 2.0}, learning_rate=0.1)
    context.skipped_iter, context.step_seconds = False, 0.5
    with pytest.raises(RuntimeError, match="tokens_per_second is None"):
        _ = context.taken_step
    context.tokens_per_second = 0.0
    taken = context.taken_step
    assert (taken.losses, taken.learning_rate, taken.is_skipped, taken.seconds) == ({"lm loss": 2.0}, 0.1, False, 0.5)
    assert taken.tokens_per_second == 0.0
