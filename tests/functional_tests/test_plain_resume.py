# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs without the distributed optimizer stop and resume bit-exact, from what stock Core wrote too."""

from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.core_repairs.plain_state import _move_step
from megatron.bridge.training.run_state.optimizer_chain import match_optimizer_chain
from tests.rigs.on_ranks import Recorder, differing
from tests.rigs.ranks import run_on_ranks
from tests.rigs.resume import without_repairs
from tests.rigs.tiny import fp32_norm_layer_spec, tiny_config

PLAIN = {"use_distributed_optimizer": False}
RUNS = {
    "FP32": (None, {}, {}),
    "FP32, SGD without momentum": (None, {"optimizer": "sgd", "sgd_momentum": 0.0}, {}),
    "FP32, not clipped": (None, {"clip_grad": 0.0}, {}),
    "bf16, FP32 norms": ("bf16_mixed", {}, {"transformer_layer_spec": fp32_norm_layer_spec}),
    "FP16, each step overflows": ("fp16_mixed", {}, {}),
    "FP32, distributed": (None, {"use_distributed_optimizer": True}, {}),
}


def _run(directory, run, *, steps=3, **checkpoint):
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    precision, optimizer, model = RUNS[run]
    cfg = tiny_config(
        directory,
        train_iters=steps,
        optimizer={**PLAIN, **optimizer},
        ddp={**PLAIN, **optimizer} if "use_distributed_optimizer" in optimizer else PLAIN,
        model=model,
        scheduler={"lr_warmup_iters": 1, "lr_decay_iters": 10},
        checkpoint={"save": None, **checkpoint},
    )
    cfg.mixed_precision = precision
    recorder = Recorder()
    pretrain(cfg, forward_step, callbacks=[recorder])
    return recorder


def _check_equal(whole, resumed, step):
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[step:]
        assert continued.learning_rates == uninterrupted.learning_rates[step:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}


@pytest.mark.parametrize("run", [run for run in RUNS if run != "FP32, distributed"])
def test_it_resumes_to_the_bit(tmp_path, run):
    whole = run_on_ranks(_run, 2, tmp_path, run, save=f"{tmp_path}/saved", save_interval=1)
    _check_equal(whole, run_on_ranks(_run, 2, tmp_path, run, load=f"{tmp_path}/saved", ckpt_step=2), 2)


def test_what_stock_core_wrote_resumes(tmp_path):
    whole = run_on_ranks(without_repairs, 2, None, _run, tmp_path, "FP32", save=f"{tmp_path}/saved", save_interval=2)
    _check_equal(whole, run_on_ranks(_run, 2, tmp_path, "FP32", load=f"{tmp_path}/saved", ckpt_step=2), 2)


@pytest.mark.parametrize(("saved", "now"), [("FP32", "FP32, distributed"), ("FP32, distributed", "FP32")])
def test_the_other_kind_of_optimizer_is_named(tmp_path, saved, now):
    run_on_ranks(_run, 1, tmp_path, saved, steps=1, save=f"{tmp_path}/saved")
    (error,) = run_on_ranks(without_repairs, 1, (), _run, tmp_path, now, load=f"{tmp_path}/saved")
    value = str(now == "FP32").lower()
    assert error.startswith("ValueError: ") and "\n" not in error
    assert f"set optimizer.use_distributed_optimizer={value} and ddp.use_distributed_optimizer={value}, or" in error


def _groups(**step):
    return [{"betas": (0.9, 0.95), "params": [0], **step}]


def test_a_step_is_found_where_another_implementation_of_adam_kept_it():
    torchs = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    by_groups = {"state": {}, "param_groups": _groups(step=7)}
    _move_step(torchs, by_groups)
    assert by_groups == {"state": {"common_step": torch.tensor(7.0)}, "param_groups": _groups()}
    by_state = {"state": {"common_step": torch.tensor(7.0)}, "param_groups": _groups()}
    _move_step(SimpleNamespace(), by_state)
    assert by_state == {"state": {}, "param_groups": _groups(step=7)}


def test_a_chain_of_another_length_is_refused():
    from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer

    optimizer = ChainedOptimizer.__new__(ChainedOptimizer)
    optimizer.chained_optimizers = [FP32Optimizer.__new__(FP32Optimizer)]
    saved = {number: {"param_groups": [{"wd_mult": 1.0}]} for number in (0, 1)} | {"param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match="state of 2 optimizers and this run 1 .*load_optim=false"):
        match_optimizer_chain(optimizer, saved)
