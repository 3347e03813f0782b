# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A loss that isn't finite: the error says whether the weights were wrong before, frozen ones too."""

import math

import pytest
import torch

from megatron.bridge.training.monitoring.finite_steps import CHECKED_LOSS, check_loss
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
