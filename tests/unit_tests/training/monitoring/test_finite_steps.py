# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A loss that isn't finite: whether the weights were wrong before; a gradient too large: why a step is left out."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.training.monitoring.finite_steps import CHECKED_LOSS, check_loss, reasons_to_skip, step_if_finite
from megatron.bridge.training.monitoring.reported_losses import Total


def _check(model, loss):
    pair = torch.tensor([loss, 8.0])
    check_loss([{CHECKED_LOSS: pair}], {CHECKED_LOSS: Total(loss, 8.0, True)}, model=[model], where="step 1")


def test_a_finite_loss_passes_whatever_the_weights():
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, math.nan)
    _check(model, 4.0)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_weights_that_were_wrong_before_are_named(loss, is_frozen):
    model = torch.nn.Linear(2, 2).requires_grad_(not is_frozen)
    with pytest.raises(FloatingPointError, match=r"on rank 0; .* Check the data and optimizer.lr$"):
        _check(model, loss)
    torch.nn.init.constant_(model.weight, math.nan)
    with pytest.raises(FloatingPointError, match=r"wrong before it \(NaN or infinite in weight, on rank 0\): resume"):
        _check(model, loss)


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
    line = "step 7 is skipped: the gradient's norm is 5, above optimizer.grad_norm_skip_threshold=2"
    assert caplog.messages == ([line] if said else [])


def test_the_reasons_of_a_run_follow_its_options():
    assert reasons_to_skip(state_with()) == "a gradient was not finite"
    assert reasons_to_skip(state_with(grad_norm_skip_threshold=2.0)) == (
        "a gradient was not finite or its norm above optimizer.grad_norm_skip_threshold=2"
    )
