# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Callbacks as classes and as registered functions."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from megatron.bridge.training.callbacks import (
    EVENTS,
    Callback,
    CallbackContext,
    CallbackManager,
    normalize_callbacks,
    should_fire,
)
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.setup import SetupOutput
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.train import _save


class Noting(Callback):
    def __init__(self, notes):
        self.notes = notes

    def on_eval_end(self, context):
        self.notes.append("class")


def test_classes_and_functions_are_called_in_order_and_share_their_state():
    notes, manager = [], CallbackManager()
    manager.register("on_eval_end", lambda context: notes.append(context.user_state["first"]))
    manager.add([Noting(notes), Noting(notes)])
    manager.register("on_eval_end", lambda context: notes.append("last"))
    manager.register("on_eval_start", lambda context: context.user_state.update(first="first"))
    for event in ("on_eval_start", "on_eval_end"):
        manager.fire(event, SimpleNamespace())
    assert notes == ["first", "class", "class", "last"] and manager.user_state == {"first": "first"}
    assert manager.events == frozenset(EVENTS) and len(manager.list_callbacks("on_eval_end")) == 4


def test_an_event_fires_only_where_something_is_called():
    manager = CallbackManager([Noting([])])
    assert should_fire(manager, "on_eval_end")
    assert not should_fire(manager, "on_train_end") and not should_fire(None, "on_eval_end")


class Quiet(Noting):
    reads_weights = False


def test_weights_are_awaited_before_callbacks_that_read_them():
    notes, manager = [], CallbackManager([Quiet([])])
    manager.register("on_eval_start", lambda context: notes.append("read"))
    manager.wait_before_reads(lambda: notes.append("waited"))
    for event in ("on_eval_start", "on_eval_end", "on_train_step_end"):
        manager.fire(event, SimpleNamespace())
    assert notes == ["waited", "read"]


def test_an_unknown_event_and_what_is_no_callback_are_refused():
    with pytest.raises(ValueError, match="no event is named 'on_step_end'"):
        CallbackManager().register("on_step_end", print)
    with pytest.raises(ValueError, match="callbacks holds a str"):
        normalize_callbacks([Noting([]), "mine"])
    manager = CallbackManager()
    assert normalize_callbacks(manager) is manager


class WritesInItsOwnWay:
    def save(self, context): ...
    def finalize_async_saves(self, state, blocking=False, terminate=False): ...


def test_a_save_of_another_manager_is_told_though_saves_are_in_the_background():
    notes, manager = [], CallbackManager()
    manager.register("on_checkpoint_save", notes.append)
    checkpoint = CheckpointConfig(save="there", async_save=True)
    state = GlobalState(SimpleNamespace(checkpoint=checkpoint), _timers=MagicMock())  # real ones need a device
    run = SetupOutput(state, [], *[None] * 5, WritesInItsOwnWay(), None)
    context = CallbackContext(state, [])
    _save(run, context, manager)
    assert notes == [context]
