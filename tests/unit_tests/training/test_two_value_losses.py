# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron.bridge.training import two_value_losses


class _OverwritesWhatItSaved(torch.autograd.Function):
    """As Core's cross-entropy: the gradient is written over the saved softmax."""

    @staticmethod
    def forward(ctx, logits):
        softmax = logits.softmax(-1)
        ctx.save_for_backward(softmax)
        return -softmax[..., 0].log()

    @staticmethod
    def backward(ctx, gradient):
        (softmax,) = ctx.saved_tensors
        softmax[..., 0] -= 1
        return softmax.mul_(gradient.unsqueeze(-1))


@pytest.fixture
def two_ranks():
    """The same twice, as far as the check sees."""
    with (
        mock.patch.object(two_value_losses, "get_model_config", lambda _: SimpleNamespace(calculate_per_token_loss=0)),
        mock.patch.object(two_value_losses.parallel_state, "get_context_parallel_world_size", return_value=2),
        mock.patch.object(two_value_losses.parallel_state, "get_context_parallel_group"),
        mock.patch.object(two_value_losses.dist, "get_world_size", return_value=2),
        mock.patch.object(two_value_losses.dist, "all_reduce", lambda total, group: total.mul_(2)),
    ):
        yield


def _backward(output, loss_function):
    step = two_value_losses.with_checked_loss(lambda _, model: (output, loss_function))
    output, checked = step(None, None)
    checked(output)[0].backward()


def test_a_loss_of_logits_goes_backward_once(two_ranks):
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    _backward(logits, lambda output: (_OverwritesWhatItSaved.apply(output).mean(), {}))
    assert torch.equal(logits.grad[0, 0], torch.tensor([-0.75, 0.25, 0.25, 0.25]) / 6)


def test_a_mean_of_losses_is_refused(two_ranks):
    with pytest.raises(ValueError, match="a mean over the tokens of this rank alone"):
        _backward(torch.ones(2, 3, requires_grad=True), lambda output: (output.mean(), {}))
