# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Loss functions of one's own, in the forms that scripts have, over micro-batches, data-parallel ranks and stages."""

from functools import partial

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

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
