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
def alike_ranks(request):
    """The same on all ranks, as far as the check sees: by sizes, and by how many ranks have losses that count."""
    of_cp, of_dp, is_sum = getattr(request, "param", (2, 1, False))
    counting = [of_cp * of_dp]
    state = two_value_losses.parallel_state
    with (
        mock.patch.object(
            two_value_losses, "get_model_config", lambda _: SimpleNamespace(calculate_per_token_loss=is_sum)
        ),
        mock.patch.object(state, "get_context_parallel_world_size", return_value=of_cp),
        mock.patch.object(state, "get_context_parallel_group", return_value=of_cp),
        mock.patch.object(state, "get_data_parallel_group", return_value=of_cp * of_dp),
        mock.patch.object(two_value_losses.dist, "get_world_size", lambda group: group),
        mock.patch.object(two_value_losses.dist, "all_reduce", lambda total, group: total.mul_(counting[0])),
    ):
        yield counting


def _backward(output, loss_function):
    step = two_value_losses.with_checked_loss(lambda _, model: (output, loss_function))
    output, checked = step(None, None)
    checked(output)[0].backward()


def test_a_loss_of_logits_goes_backward_once(alike_ranks):
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    _backward(logits, lambda output: (_OverwritesWhatItSaved.apply(output).mean(), {}))
    assert torch.equal(logits.grad[0, 0], torch.tensor([-0.75, 0.25, 0.25, 0.25]) / 6)


def test_a_mean_of_losses_is_refused(alike_ranks):
    with pytest.raises(ValueError, match="a mean over the tokens of this rank alone"):
        _backward(torch.ones(2, 3, requires_grad=True), lambda output: (output.mean(), {}))


def test_a_first_micro_batch_without_answers_on_the_other_rank_settles_nothing(alike_ranks):
    output = torch.ones(2, 3, requires_grad=True)
    step = two_value_losses.with_checked_loss(lambda _, model: (output, lambda output: (output.mean(), {})))
    alike_ranks[:] = [1]
    for _ in range(2):
        _, checked = step(None, None)
        checked(output)
    alike_ranks[:] = [2]
    _, checked = step(None, None)
    with pytest.raises(ValueError, match="a mean over the tokens of this rank alone"):
        checked(output)


def test_a_sum_over_the_whole_row_is_checked_once(alike_ranks):
    output = torch.ones(2, 3, requires_grad=True)

    def loss(output):
        return output.mean() / 2, {}

    step = two_value_losses.with_checked_loss(lambda _, model: (output, loss))
    step(None, None)[1](output)
    assert step(None, None)[1] is loss


@pytest.mark.parametrize("alike_ranks", [(2, 2, True)], indirect=True)
@pytest.mark.parametrize(
    ("sharing", "tokens", "times", "is_right_averaged"),
    [(1, "this rank alone", 8, False), (2, "the whole row", 4, True), (4, "all ranks", 2, False)],
)
def test_what_core_multiplies_by_shared_rows_is_refused(alike_ranks, sharing, tokens, times, is_right_averaged):
    """Two rows, two ranks each: the mean over any tokens, with Core's factor, and without."""
    output = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=f"tokens of {tokens}: .* multiplies .* {times} times too large") as said:
        _backward(output, lambda output: (output.mean() / sharing, {}))
    assert ("calculate_per_token_loss=false" in str(said.value)) == is_right_averaged
    _backward(output, lambda output: (output.mean() / (4 * 2), {}))
