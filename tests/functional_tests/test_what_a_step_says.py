# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""One run's figures belong to the step they stand at: what was skipped, evaluated, learned, and at which rate."""

import logging

import pytest
import torch

from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

SKIPPED, UNLEARNED, STEPS = 2, 3, 6


def _learns_nothing_at(which):
    from functools import partial

    from megatron.bridge.training.gpt_step import get_batch
    from megatron.bridge.training.losses import masked_next_token_loss

    def step(state, data_iterator, model):
        batch = get_batch(data_iterator)
        mask = batch["loss_mask"]
        if torch.is_grad_enabled() and state.train_state.step == which - 1:
            mask = torch.zeros_like(mask)
        output = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
        return output, partial(masked_next_token_loss, mask)

    return step


def _run(directory):
    """Steps that were trained and evaluated, the rates they were taken with, the metrics file, and the log."""
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.monitoring.metrics import METRICS_FILE, read_metrics
    from megatron.bridge.training.pretrain import pretrain

    seen = {"trained": [], "evaluated": [], "rates": {}, "log": []}

    class Watch(Callback):
        def on_train_step_start(self, context):
            step = context.state.train_state.step + 1
            seen["trained"].append(step)
            seen["rates"][step] = context.optimizer.param_groups[0]["lr"]

        def on_eval_end(self, context):
            seen["evaluated"].append(context.state.train_state.step)

    class Lines(logging.Handler):
        def emit(self, record):
            seen["log"].append(record.getMessage())

    cfg = tiny_config(
        directory,
        train_iters=STEPS,
        train={"iterations_to_skip": [SKIPPED, 99], "exit_interval": 4},
        validation={"eval_interval": 2, "eval_iters": 1, "eval_at_start": True},
        scheduler={"lr_warmup_iters": 3},
        checkpoint={"load": f"{directory}/checkpoints", "save": f"{directory}/checkpoints"},
    )
    lines = Lines()
    logging.getLogger("megatron.bridge").addHandler(lines)
    try:
        pretrain(cfg, _learns_nothing_at(UNLEARNED), [Watch()])
    finally:
        logging.getLogger("megatron.bridge").removeHandler(lines)
    seen["metrics"] = read_metrics(f"{directory}/checkpoints/{METRICS_FILE}")
    return seen


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """A run that stops after step 4, its resume to the last step, and a start with nothing left to do."""
    directory = tmp_path_factory.mktemp("run")
    return [run_on_ranks(_run, 1, directory)[0] for _ in range(3)]


def test_steps_are_skipped_by_the_numbers_that_the_log_shows(starts):
    assert [start["trained"] for start in starts] == [[1, 3, 4], [5, 6], []]
    log, resumed = (" ".join(" ".join(start["log"]).split()) for start in starts[:2])
    assert f"step {SKIPPED} skipped (train.iterations_to_skip)" in log
    assert "left out 2, 99 (train.iterations_to_skip); without effect: 99, not among the steps to come" in log
    assert "without effect: 2, 99" in resumed


def test_the_same_weights_are_evaluated_once_in_a_start(starts):
    assert [start["evaluated"] for start in starts] == [[0, 2, 4], [4, 6], [6]]


def test_the_rate_shown_is_the_one_that_the_step_was_taken_with(starts):
    shown = {line["step"]: line["learning_rate"] for line in starts[2]["metrics"] if line["split"] == "train"}
    assert shown == {**starts[0]["rates"], **starts[1]["rates"]}
    assert len(set(shown.values())) == len(shown), "the schedule stood still: nothing was compared"


def test_a_step_that_learns_nothing_has_no_loss(starts):
    losses = {line["step"]: line["lm loss"] for line in starts[2]["metrics"] if line["split"] == "train"}
    assert [step for step, loss in losses.items() if loss is None] == [UNLEARNED]
    assert sum(f"step {UNLEARNED} has no token to learn" in line for line in starts[0]["log"]) == 1
    assert not any("no token to learn" in line for line in starts[1]["log"])


def _fp16_run(directory, to_tensorboard):
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.monitoring.metrics import METRICS_FILE, read_metrics
    from megatron.bridge.training.pretrain import pretrain

    cfg = tiny_config(
        directory,
        train_iters=3,
        logger={"tensorboard_dir": f"{directory}/curves", "log_loss_scale_to_tensorboard": to_tensorboard},
        checkpoint={"save": f"{directory}/checkpoints"},
    )
    cfg.mixed_precision = "fp16_mixed"  # its first loss scale is 2**32
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron.bridge").addHandler(handler)
    try:
        pretrain(cfg, forward_step)
    finally:
        logging.getLogger("megatron.bridge").removeHandler(handler)
    return "\n".join(lines), read_metrics(f"{directory}/curves/{METRICS_FILE}")


@pytest.mark.parametrize("to_tensorboard", [True, False])
def test_steps_that_fp16_skips_are_counted_and_the_loss_scale_is_shown(tmp_path, to_tensorboard):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [(log, metrics)] = run_on_ranks(_fp16_run, 1, tmp_path, to_tensorboard)
    train = [line for line in metrics if line["split"] == "train"]
    assert [line["skipped"] for line in train] == [True] * 3
    assert train[0]["loss_scale"] == 2.0**32
    assert "loss scale 4.29497e+09, skipped 1 of 1 steps (a gradient was not finite)" in log
    assert "3 of these steps changed nothing: a gradient was not finite" in log
    curves = EventAccumulator(str(tmp_path / "curves"))
    curves.Reload()
    assert ("loss-scale" in curves.Tags()["scalars"]) == to_tensorboard
