# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Loss functions of one's own, in the forms that scripts have, over micro-batches, data-parallel ranks and stages."""

from functools import partial

import pytest
import torch

from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

FORMS = {
    "tensor of two": lambda total, count: torch.stack([total, count]),
    "pair": lambda total, count: (total, count),
    "scalar": lambda total, count: total / count,
    "number": lambda total, count: float(total / count),
}


def _loss(mask, output):
    total, count = (output.float() * mask).sum(), mask.sum()
    figures = {f"as a {form}": report(total.detach(), count) for form, report in FORMS.items()}
    return total, count.to(torch.int), {**figures, "half": 0.5}


def _loss_that_reports_a_text(mask, output):
    total, count = (output.float() * mask).sum(), mask.sum()
    return total, count.to(torch.int), {"my loss": "low"}


def _step(loss_function, state, data_iterator, model):
    from megatron.bridge.training.gpt_step import get_batch

    batch = get_batch(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
    return output, partial(loss_function, batch["loss_mask"])


def _losses_of_each_step(directory, loss_function, **model):
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.pretrain import pretrain

    found = []

    class Watch(Callback):
        def on_train_step_end(self, context):
            found.append((dict(context.loss_dict), context.num_tokens))

    def step(state, data_iterator, model):
        return _step(loss_function, state, data_iterator, model)

    cfg = tiny_config(directory, train_iters=2, model=model, checkpoint={"save": None})
    try:
        pretrain(cfg, step, [Watch()])
    except ValueError as error:
        return str(error)
    return found


@pytest.mark.parametrize(
    "model", [{}, {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.bfloat16}], ids=["DP 2", "PP 2"]
)
def test_each_form_is_added_up_and_every_rank_sees_the_same(tmp_path, model):
    first, second = run_on_ranks(_losses_of_each_step, 2, tmp_path, _loss, **model)
    assert first == second and len(first) == 2
    for losses, num_tokens in first:
        assert losses["as a pair"] == losses["as a tensor of two"] > 4
        # Means of micro-batches of nearly the same length.
        assert losses["as a scalar"] == pytest.approx(losses["as a pair"], rel=0.02)
        assert losses["as a number"] == pytest.approx(losses["as a scalar"], rel=1e-6)
        assert losses["half"] == 0.5
        assert num_tokens > 20


@pytest.mark.parametrize(
    "model", [{}, {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.bfloat16}], ids=["DP 2", "PP 2"]
)
def test_a_form_that_is_none_ends_all_ranks_with_one_line(tmp_path, model):
    said = run_on_ranks(_losses_of_each_step, 2, tmp_path, _loss_that_reports_a_text, **model)
    assert all("the loss function reports 'my loss' as a str: expected a number" in line for line in said)


def _mean_of_this_rank(mask, output):
    loss = (output.float() * mask).sum() / mask.sum()
    return loss, {"my loss": loss.detach()}


def _mean_of_all_ranks(mask, output):
    count = mask.sum()
    torch.distributed.all_reduce(count)
    total = (output.float() * mask).sum()
    return total / count, {"my loss": (total.detach(), mask.sum())}


def test_two_values_are_a_mean_of_the_ranks_whose_gradients_are_added(tmp_path):
    """By tokens Core adds up the gradients of all ranks, else it averages them."""
    by_tokens = {"calculate_per_token_loss": True}
    refused = run_on_ranks(_losses_of_each_step, 2, tmp_path, _mean_of_this_rank, **by_tokens)
    for said in refused:
        assert "the gradients of 2 ranks, which makes them 2 times too large; give three values" in said
        assert "or set model.calculate_per_token_loss=false" in said and "\n" not in said
    for loss, model in ((_mean_of_this_rank, {"calculate_per_token_loss": False}), (_mean_of_all_ranks, by_tokens)):
        first, second = run_on_ranks(_losses_of_each_step, 2, tmp_path, loss, **model)
        assert first == second and len(first) == 2


PAIR, SCALAR = (6.0, 4.0), 3.0
UNLIKE = {
    "another name on each rank": ([[{"a": PAIR}], [{"b": SCALAR}]], {"a": (6.0, 4.0), "b": (3.0, 1.0)}),
    "nothing on one rank": ([[{"a": PAIR}], [{}]], {"a": (6.0, 4.0)}),
    "some micro-batches": ([[{"a": 1.0}, {}], [{"a": 5.0}, {"a": 3.0, "b": 2.0}]], {"a": (9.0, 3.0), "b": (2.0, 1.0)}),
    "another order": ([[{"a": 1.0, "b": PAIR}], [{"b": PAIR, "a": 2.0}]], {"a": (3.0, 2.0), "b": (12.0, 8.0)}),
    "two forms on two ranks": ([[{"a": PAIR}], [{"a": SCALAR}]], "reports 'a' as (sum, count) and as a single number"),
    "two forms on one rank": ([[{"a": SCALAR}], [{"a": PAIR}, {"a": SCALAR}]], "give them two names"),
    "no form on one rank": ([[{"a": PAIR}], [{"a": "low"}]], "reports 'a' as a str"),
    "no text on one rank": ([[{"a": PAIR}], [{3: PAIR}]], "names a figure 3, a int: expected a text"),
    "no dict on one rank": ([[{"a": PAIR}], [[1.0]]], "the loss function's last value is a list: expected a dict"),
}


def _sums(reported, **sizes):
    """What each case gives on this rank."""
    from megatron.core import mpu

    from megatron.bridge.training.monitoring.reported_losses import sum_over_ranks
    from megatron.bridge.utils.distributed import initialize_model_parallel

    initialize_model_parallel(**sizes)
    rank = max(mpu.get_data_parallel_rank(), mpu.get_tensor_model_parallel_rank())
    found = []
    for of_ranks in reported:
        try:
            found.append({name: (total.sum, total.counted) for name, total in sum_over_ranks(of_ranks[rank]).items()})
        except ValueError as error:
            found.append(str(error))
    return found


def test_ranks_that_report_unlike_figures_agree_and_none_waits(tmp_path):
    of_ranks = run_on_ranks(_sums, 2, [reported for reported, _ in UNLIKE.values()], timeout_seconds=60)
    for (case, (_, expected)), *found in zip(UNLIKE.items(), *of_ranks, strict=True):
        assert found[0] == found[1], case
        assert expected in found[0] if isinstance(expected, str) else found[0] == expected, case


def test_what_one_tensor_parallel_rank_cannot_add_up_ends_both():
    cases = [UNLIKE["no form on one rank"][0], UNLIKE["another name on each rank"][0]]
    first, second = run_on_ranks(_sums, 2, cases, tensor_model_parallel_size=2, timeout_seconds=60)
    assert first[0] == second[0] and "reports 'a' as a str" in first[0]
    assert (first[1], second[1]) == ({"a": (6.0, 4.0)}, {"b": (3.0, 1.0)})
