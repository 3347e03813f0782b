# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Whose lines the log shows: modules can be left out, and all loggers given one level."""

import logging

import pytest

from megatron.bridge.utils.logging import filter_modules, set_level_of_all


class _Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def kept():
    handler, root = _Kept(), logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    root_level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    filter_modules(None)
    root.removeHandler(handler)
    root.setLevel(root_level)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _say(*names):
    for name in names:
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "%s %s", name, logging.getLevelName(level))


def test_a_module_is_left_out_with_those_below_it(kept):
    filter_modules(["noisy"])
    _say("noisy", "noisy.inner", "noisybutnot")
    assert kept.lines == [
        "noisy ERROR",
        "noisy.inner ERROR",
        "noisybutnot INFO",
        "noisybutnot WARNING",
        "noisybutnot ERROR",
    ]


def test_its_warnings_may_stay(kept):
    filter_modules(["noisy"], warnings=False)
    _say("noisy")
    assert kept.lines == ["noisy WARNING", "noisy ERROR"]


def test_the_next_run_leaves_out_what_it_says(kept):
    filter_modules(["first"])
    filter_modules(["second"])
    _say("first", "second")
    assert kept.lines == ["first INFO", "first WARNING", "first ERROR", "second ERROR"]


def test_all_loggers_get_one_level(kept):
    logging.getLogger("chatty.library").setLevel(logging.DEBUG)
    set_level_of_all(logging.ERROR)
    _say("chatty.library", "made.later")
    assert kept.lines == ["chatty.library ERROR", "made.later ERROR"]
