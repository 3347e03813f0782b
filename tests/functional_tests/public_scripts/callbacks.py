# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Callbacks in both forms: a class, and functions registered for events."""

import sys
import time

import torch
from common import finetuning_config

from megatron.bridge.training.callbacks import Callback, CallbackContext, CallbackManager
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step


class Timing(Callback):
    def on_train_start(self, context: CallbackContext) -> None:
        context.user_state["step_times"] = []

    def on_train_step_start(self, context: CallbackContext) -> None:
        context.user_state["started"] = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        context.user_state["step_times"].append(time.perf_counter() - context.user_state["started"])
        assert isinstance(context.grad_norm, float) and context.skipped_iter is False
        assert torch.is_tensor(torch.as_tensor(context.loss_dict["lm loss"]))


events = []


def note(event: str):
    return lambda context: events.append((event, context.state.train_state.step))


class Saves(Callback):
    def on_data_init_start(self, context: CallbackContext) -> None:
        events.append(("on_data_init_start", context.state.train_state.step))

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        events.append(("on_checkpoint_save", context.state.train_state.step))


if __name__ == "__main__":
    hf_model, data, output = sys.argv[1:]
    manager = CallbackManager()
    manager.add(Timing())
    manager.add([Saves()])
    for event in ("on_train_start", "on_train_end", "on_eval_start", "on_eval_end"):
        manager.register(event, note(event))
    cfg = finetuning_config(hf_model, data, output)
    finetune(cfg, forward_step, callbacks=manager)
    assert len(manager.user_state["step_times"]) == 2
    assert events == [
        ("on_data_init_start", 0),
        ("on_train_start", 0),
        ("on_eval_start", 2),
        ("on_eval_end", 2),
        ("on_checkpoint_save", 2),
        ("on_train_end", 2),
    ], events
