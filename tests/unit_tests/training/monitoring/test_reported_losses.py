# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Each form in which a loss function reports a figure: what it means, and which are none."""

import math

import numpy as np
import pytest
import torch

from megatron.bridge.training.monitoring.reported_losses import Total, means, sum_and_count, tokens_of


@pytest.mark.parametrize(
    ("value", "pair", "is_per_token"),
    [
        (torch.tensor([6.0, 4.0]), [6.0, 4.0], True),
        (torch.tensor([[6.0, 4.0]], requires_grad=True), [6.0, 4.0], True),
        ((torch.tensor(6.0), torch.tensor(4)), [6.0, 4.0], True),
        ([torch.tensor([6.0]), 4], [6.0, 4.0], True),
        (torch.tensor(1.5), [1.5, 1.0], False),
        (torch.tensor([1.5], dtype=torch.bfloat16), [1.5, 1.0], False),
        ((torch.tensor(1.5),), [1.5, 1.0], False),
        (1.5, [1.5, 1.0], False),
        (3, [3.0, 1.0], False),
        (np.float32(1.5), [1.5, 1.0], False),
        (np.array([6.0, 4.0]), [6.0, 4.0], True),
    ],
)
def test_a_form_that_is_known(value, pair, is_per_token):
    found, counted = sum_and_count("my loss", value, "cpu")
    assert (found.tolist(), found.dtype, found.requires_grad) == (pair, torch.float32, False)
    assert counted == is_per_token


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(3), "Tensor of shape [3]"),
        (torch.zeros(0), "Tensor of shape [0]"),
        ((), "tuple of 0"),
        ((1.0, 2.0, 3.0), "tuple of 3"),
        ("0.5", "str"),
        (None, "NoneType"),
        ({"a": 1}, "dict"),
        (torch.tensor(1j), "Tensor of shape [] (it is complex)"),
    ],
)
def test_a_form_that_is_none_is_named(value, said):
    with pytest.raises(ValueError, match="the loss function reports 'my loss' as a ") as error:
        sum_and_count("my loss", value, "cpu")
    assert f" as a {said}: expected a number, a tensor of one element, or (sum, count)" in str(error.value)


@pytest.mark.parametrize("value", [torch.ones(2).to_sparse(), torch.tensor(1.0, device="meta"), 10**400])
def test_what_torch_cannot_take_is_named_too(value):
    with pytest.raises(ValueError, match=r"the loss function reports 'my loss' as a .* \(.*\): expected a number"):
        sum_and_count("my loss", value, "cpu")


def test_nothing_counted_is_no_mean_and_only_tokens_are_tokens():
    totals = {"lm loss": Total(6.0, 4.0, True), "accuracy": Total(1.0, 8.0, False), "empty": Total(0.0, 0.0, True)}
    found = means(totals)
    assert (found["lm loss"], found["accuracy"]) == (1.5, 0.125) and math.isnan(found["empty"])
    assert tokens_of(totals.values()) == 4
    assert tokens_of([totals["accuracy"]]) is None
    assert tokens_of([totals["empty"]]) == 0
