# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A loss, a gradient or weights that are NaN or infinite on one rank of two: nothing is stepped on, saved or pruned."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron.bridge.training.callbacks import Callback
from tests.rigs.on_ranks import weights_of
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config

PARAMETER = "decoder.layers.1.mlp.linear_fc2.weight"
PLAIN = {"use_distributed_optimizer": False}
OFFLOAD = {"optimizer_cpu_offload": True}
RUNS = {
    "distributed": ("bf16_mixed", {}),
    "plain": ("bf16_mixed", PLAIN),
    "half offloaded": ("bf16_mixed", {**OFFLOAD, "optimizer_offload_fraction": 0.5}),
    "precision-aware": ("bf16_mixed", {**OFFLOAD, "use_precision_aware_optimizer": True}),
    "FP32": (None, {"clip_grad": 0.0}),
    "FP32, plain": (None, PLAIN),
    "FP32, SGD": (None, {**PLAIN, "optimizer": "sgd"}),
}
SKIPPING = ("distributed", "FP32, plain", "half offloaded")


class _Breaks(Callback):
    """Makes a gradient, the loss or a weight of rank 1 infinite or NaN at one step, and looks at the result."""

    def __init__(self, what, *, factor=math.nan, at=(2,), rank=1):
        self.what, self.factor, self.at, self.is_here = what, factor, at, dist.get_rank() == rank
        self.norms, self.skipped, self.weights, self.hook = {}, [], {}, None

    def forward_step(self, state, data_iterator, model):
        from megatron.bridge.training.gpt_step import forward_step

        output, loss = forward_step(state, data_iterator, model)
        is_now = self.is_here and state.train_state.step + 1 in self.at and self.what in ("loss", "evaluation")
        return (output * self.factor if is_now and model.training == (self.what == "loss") else output), loss

    def on_train_step_start(self, context):
        (param,) = (param for name, param in context.model[0].named_parameters() if name.endswith(PARAMETER))
        if self.is_here and self.what == "gradient" and context.state.train_state.step + 1 in self.at:
            self.hook = param.register_hook(lambda gradient: gradient * self.factor)
        self.weights = weights_of(context.model)

    def on_train_step_end(self, context):
        step = context.state.train_state.step
        self.norms[step] = context.grad_norm
        if context.skipped_iter:
            self.skipped.append(step)
            after = weights_of(context.model)
            assert all(torch.equal(after[name], weight) for name, weight in self.weights.items())
        if self.hook is not None:
            self.hook.remove()
        if self.is_here and self.what == "weight" and step in self.at:
            (param,) = (param for name, param in context.model[0].named_parameters() if name.endswith(PARAMETER))
            with torch.no_grad():
                param.view(-1)[3] = self.factor


def _run(directory, run, what, train=None, evaluations=0, **broken):
    """The error, or none; the iterations that are saved; the breaker."""
    from megatron.bridge.training.pretrain import pretrain

    precision, optimizer = RUNS[run]
    cfg = tiny_config(
        directory,
        train_iters=4,
        optimizer=optimizer,
        ddp={
            "use_distributed_optimizer": optimizer.get("use_distributed_optimizer", True),
            "check_for_nan_in_grad": run == "plain",  # Core's own, which would end one rank
        },
        train=train or {},
        validation={"eval_iters": evaluations, "eval_interval": 1},
        checkpoint={"save_interval": 1, "most_recent_k": 1},
    )
    cfg.mixed_precision = precision
    breaks = _Breaks(what, **broken)
    try:
        pretrain(cfg, breaks.forward_step, callbacks=[breaks])
        error = None
    except FloatingPointError as raised:
        error = str(raised)
    return error, sorted(path.name for path in directory.glob("checkpoints/iter_*")), breaks.skipped, breaks.norms


@pytest.mark.parametrize("run", [run for run in RUNS if run not in SKIPPING])
def test_a_gradient_that_is_not_a_number_ends_the_run_before_the_step(tmp_path, run):
    factor = math.inf if run == "plain" else math.nan
    results = run_on_ranks(_run, 2, tmp_path, run, "gradient", factor=factor)
    (error,) = {error for error, *_ in results}
    assert error.startswith("step 2: the gradient's norm is ") and f"in {PARAMETER}, on rank" in error
    assert "\n" not in error
    for _, saved, _, norms in results:
        assert saved == ["iter_0000001"] and list(norms) == [1]


def test_so_does_one_whose_norm_overflows(tmp_path):
    (error,) = {error for error, *_ in run_on_ranks(_run, 2, tmp_path, "FP32", "gradient", factor=1e25)}
    assert error.startswith("step 2: the gradient's norm is inf: too large for FP32") and f"of {PARAMETER} on" in error


@pytest.mark.parametrize("run", SKIPPING)
def test_steps_are_left_out_where_that_is_asked_for(tmp_path, run):
    results = run_on_ranks(_run, 2, tmp_path, run, "gradient", train={"max_nonfinite_steps": 1}, at=(1, 3))
    for error, saved, skipped, norms in results:
        assert error is None and saved == ["iter_0000004"] and skipped == [1, 3]
        assert [math.isfinite(norm) for norm in norms.values()] == [False, True, False, True]


def test_more_in_a_row_than_may_be_left_out_end_the_run(tmp_path):
    results = run_on_ranks(_run, 2, tmp_path, "distributed", "loss", train={"max_nonfinite_steps": 1}, at=(2, 3))
    for error, saved, skipped, _ in results:
        assert error.startswith("step 3: the gradient's norm is nan: ") and "(after 1 in a row" in error
        assert saved == ["iter_0000002"] and skipped == [2]


def test_a_loss_that_is_not_a_number_ends_all_ranks(tmp_path):
    for error, saved, *_ in run_on_ranks(_run, 2, tmp_path, "distributed", "loss"):
        assert error.startswith("step 2: the loss over ") and " tokens is nan, on rank 1; " in error
        assert saved == ["iter_0000001"]


def test_so_does_one_of_an_evaluation(tmp_path):
    for error, *_ in run_on_ranks(_run, 2, tmp_path, "distributed", "evaluation", evaluations=1):
        assert error.startswith("validation at step 1: the loss over ") and "is nan, on rank 1; " in error


def test_weights_that_are_not_numbers_are_not_saved(tmp_path):
    for error, saved, *_ in run_on_ranks(_run, 2, tmp_path, "distributed", "weight", factor=math.inf):
        assert error.startswith(f"step 2 isn't saved: its weights are NaN or infinite (NaN or infinite in {PARAMETER}")
        assert "on rank 1)" in error and saved == ["iter_0000001"]
