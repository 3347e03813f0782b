# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Forward steps of 2, 3 and 4 arguments, each in a run of its own."""

import sys
from collections.abc import Iterable
from functools import partial

import torch
from common import finetuning_config

from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import get_batch_from_iterator
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.state import GlobalState


def loss_of(loss_mask: torch.Tensor, output_tensor: torch.Tensor):
    losses = output_tensor.float()
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1) * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    reporting_loss = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": reporting_loss}


def two(data_iterator: Iterable, model):
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(loss_of, batch["loss_mask"])


def three(state: GlobalState, data_iterator: Iterable, model):
    state.timers("batch-generator", log_level=2).start()
    batch = get_batch_from_iterator(data_iterator, use_mtp=False)
    state.timers("batch-generator").stop()
    tokens, labels = batch["tokens"], batch["labels"]
    with state.straggler_timer:
        output = model(tokens, batch["position_ids"], batch["attention_mask"], labels=labels)
    check_for_nan = state.cfg.rerun_state_machine.check_for_nan_in_loss
    return output, partial(masked_next_token_loss, batch["loss_mask"], check_for_nan_in_loss=check_for_nan)


def four(global_state: GlobalState, data_iterator: Iterable, model, return_schedule_plan: bool = False):
    assert not return_schedule_plan
    return two(data_iterator, model)


class Step:
    def __call__(self, state: GlobalState, data_iterator: Iterable, model, return_schedule_plan: bool = False):
        return two(data_iterator, model)


if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    for name, forward_step in (("two", two), ("three", three), ("four", four), ("class", Step())):
        cfg = finetuning_config(hf_model, data, f"{output}/{name}")
        cfg.train.train_iters = 1
        finetune(cfg, forward_step)
