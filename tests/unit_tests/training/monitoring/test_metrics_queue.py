# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A place for figures that is away: the run neither ends nor waits, and what it missed comes later."""

import logging
import threading
from types import SimpleNamespace

import pytest

from megatron.bridge.training.monitoring.metrics_queue import MetricsQueue, Patience

SHORT = Patience(first_pause_seconds=0.01)


def _state(step):
    return SimpleNamespace(train_state=SimpleNamespace(step=step))


class _Place:
    """Takes steps, but for those that `refuses` says."""

    def __init__(self, refuses):
        self.refuses, self.taken, self.tries = refuses, [], 0

    def write(self, state, split, values):
        self.tries += 1
        if self.refuses(self, state.train_state.step):
            raise ConnectionError("the server\nis away")
        self.taken.append(state.train_state.step)


def _hand_over(place, steps, *, at_once, close=lambda: None, patience=SHORT):
    figures, state = MetricsQueue("Place", place.write, at_once=at_once, patience=patience), _state(0)
    for state.train_state.step in steps:
        figures.hand_over(state, "train", {})
    figures.finish(close)


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(params=[True, False], ids=["at once", "by a thread"])
def at_once(request):
    return request.param


def test_each_line_comes_with_its_own_step(at_once, caplog):
    place = _Place(lambda place, step: False)
    _hand_over(place, [1, 2, 3], at_once=at_once)
    assert place.taken == [1, 2, 3] and not _warnings(caplog)


def test_what_was_missed_comes_later_and_in_order(at_once, caplog):
    place = _Place(lambda place, step: step == 3 and place.tries == 3)  # once; the last try is the end's
    _hand_over(place, [1, 2, 3, 4, 5], at_once=at_once)
    assert place.taken == [1, 2, 3, 4, 5]
    assert _warnings(caplog) == [
        "Place did not accept the metrics of step 3 (ConnectionError: the server is away): the run continues, "
        "and they are sent again later"
    ]


def test_pauses_grow_while_it_is_away(caplog):
    place, state, now = _Place(lambda place, step: True), _state(0), 0.0
    figures = MetricsQueue("Place", place.write, at_once=True, patience=SHORT, clock=lambda: now)
    tries = []
    for state.train_state.step in range(1, 2001):
        now += 0.01
        before = place.tries
        figures.hand_over(state, "train", {})
        tries += [round(now, 2)] if place.tries > before else []
    assert tries == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24], abs=0.05)
    caplog.set_level(logging.INFO)
    figures.finish(lambda: None)
    assert caplog.messages[-1] == "Place did not accept 2000 lines of metrics" and len(_warnings(caplog)) == 1


def test_a_line_that_is_refused_does_not_hold_up_the_others(at_once):
    place = _Place(lambda place, step: step in (2, 3))
    _hand_over(place, range(1, 9), at_once=at_once)
    assert place.taken == [1, 4, 5, 6, 7, 8]


def test_the_oldest_is_given_up_when_too_many_wait():
    patience = Patience(most_waiting=3, first_pause_seconds=300)  # no second try before the end, however slow this is
    place = _Place(lambda place, step: place.tries == 1)
    _hand_over(place, range(1, 7), at_once=True, patience=patience)
    assert place.taken == [4, 5, 6]


def test_one_that_never_answers_holds_nobody(caplog):
    caplog.set_level(logging.INFO)
    before = set(threading.enumerate())
    asked, never = threading.Event(), threading.Event()
    place = _Place(lambda place, step: step == 2 and not asked.set() and never.wait())
    patience = Patience(first_pause_seconds=0.01, seconds_without_progress=0.05)
    figures, state = MetricsQueue("Place", place.write, at_once=False, patience=patience), _state(0)
    for state.train_state.step in range(1, 6):
        figures.hand_over(state, "train", {})
    assert asked.wait(60)  # step 2 is on its way
    figures.finish(never.wait)
    assert place.taken == [1]
    assert caplog.messages[-1] == "Place did not accept 4 lines of metrics"
    never.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()  # what it says at its end belongs to this test


def test_an_error_at_the_end_is_a_warning(at_once, caplog):
    def close():
        raise OSError("No space left on device")

    _hand_over(_Place(lambda place, step: False), [1], at_once=at_once, close=close)
    assert _warnings(caplog) == [
        "Place could not be closed (OSError: No space left on device); the run is not affected"
    ]
