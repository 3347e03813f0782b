# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Steps that Core leaves out because the gradient is too large (`optimizer.grad_norm_skip_threshold`) are said so."""

from types import SimpleNamespace

import pytest

from megatron.bridge.training.monitoring.finite_steps import reasons_to_skip, step_if_finite


def state_with(**optimizer):
    cfg = SimpleNamespace(optimizer=SimpleNamespace(**optimizer))
    return SimpleNamespace(cfg=cfg, train_state=SimpleNamespace(step=6), num_nonfinite_steps=0)


@pytest.mark.parametrize(
    ("options", "norm", "updated", "said"),
    [
        ({"grad_norm_skip_threshold": 2.0}, 5.0, False, True),
        ({"grad_norm_skip_threshold": 2.0}, 1.0, True, False),
        ({"grad_norm_skip_threshold": float("inf")}, 5.0, False, False),  # FP16's loss scaling skipped it
        ({}, 5.0, False, False),  # an older Core
        ({"grad_norm_skip_threshold": 2.0}, None, False, False),
    ],
)
def test_the_warning_names_the_option_where_it_was_the_reason(options, norm, updated, said, caplog):
    optimizer = SimpleNamespace(step=lambda: (updated, norm, None))
    assert step_if_finite(state_with(**options), [], optimizer) == (updated, norm)
    line = "step 7 is left out: the gradient's norm is 5, above optimizer.grad_norm_skip_threshold=2"
    assert caplog.messages == ([line] if said else [])


def test_the_reasons_of_a_run_follow_its_options():
    assert reasons_to_skip(state_with()) == "a gradient was not finite"
    assert reasons_to_skip(state_with(grad_norm_skip_threshold=2.0)) == (
        "a gradient was not finite or its norm above optimizer.grad_norm_skip_threshold=2"
    )
