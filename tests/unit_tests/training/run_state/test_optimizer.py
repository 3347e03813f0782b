# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Optimizer state of another kind is refused in one line that names the option; other frozen weights are named."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.training.run_state.optimizer import advice_on, changed_moments, check_kind_of_optimizer

BY_BUCKET, FULLY = ({"distrib_optim_sharding_type": name} for name in ("dp_reshardable", "fully_reshardable"))
PLAIN = {"chained_optim_avoid_prefix": True}


def _check(metadata, saved, *, kind="adam", bf16=True, fp16=False, in_fp32=True):
    cfg = SimpleNamespace(
        model=SimpleNamespace(bf16=bf16, fp16=fp16),
        optimizer=SimpleNamespace(optimizer=kind),
        ddp=SimpleNamespace(
            use_distributed_optimizer="distrib_optim_sharding_type" in metadata, grad_reduce_in_fp32=in_fp32
        ),
    )
    check_kind_of_optimizer(cfg, saved, Path("there"), metadata)


def _saved(**formats):
    return {"optimizer": {"optimizer": "adam"}, "model": {"bf16": False, "fp16": False, **formats}, "ddp": {}}


@pytest.mark.parametrize(
    ("metadata", "saved", "now", "line"),
    [
        (PLAIN, _saved(), {}, r"state of FP32 weights, and this run's are BF16: set mixed_precision as it was \("),
        (PLAIN, _saved(bf16=True), {"bf16": False}, "state of BF16 weights, and this run's are FP32"),
        (BY_BUCKET, _saved(fp16=True), {}, "state of FP16 weights, and this run's are BF16"),
        (
            BY_BUCKET,
            {**_saved(bf16=True), "ddp": {"grad_reduce_in_fp32": False}},
            {},
            "by buckets of ddp.grad_reduce_in_fp32=False, and this run has True: set it to False",
        ),
        (PLAIN, _saved(bf16=True), {"kind": "sgd"}, "state of optimizer.optimizer=adam, and this run has sgd: set it"),
    ],
)
def test_state_of_another_kind_is_refused(metadata, saved, now, line):
    with pytest.raises(ValueError, match=line) as error:
        _check(metadata, saved, **now)
    assert str(error.value).endswith("load its weights alone with checkpoint.load_optim=false")
    assert "\n" not in str(error.value)


def test_moments_in_another_format_are_named():
    cfg = SimpleNamespace(optimizer=SimpleNamespace(exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.float32))
    saved = {"exp_avg_dtype": {"_target_": "torch.float32"}, "exp_avg_sq_dtype": "torch.bfloat16"}
    assert list(changed_moments(cfg, {"optimizer": saved})) == [
        "exp_avg is rounded to optimizer.exp_avg_dtype=torch.bfloat16 from torch.float32",
        "exp_avg_sq is widened to optimizer.exp_avg_sq_dtype=torch.float32 from torch.bfloat16",
    ]
    assert list(changed_moments(cfg, {})) == []


@pytest.mark.parametrize("saved", [_saved(bf16=True), _saved(fp16=True), {}])
@pytest.mark.parametrize("metadata", [PLAIN, FULLY])
def test_16_bit_weights_of_the_other_kind_have_the_same_masters(metadata, saved):
    _check(metadata, saved)


@pytest.mark.parametrize("in_fp32", [False, True])
def test_fp32_gradients_are_reduced_in_fp32_whatever_is_said(in_fp32):
    _check(BY_BUCKET, {**_saved(), "ddp": {"grad_reduce_in_fp32": not in_fp32}}, bf16=False, in_fp32=in_fp32)


def _advice(model, keys, stored=("optimizer.state.exp_avg.bias",)):
    return advice_on([model])(keys, stored)


def test_what_is_frozen_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert "this run has frozen nothing; freeze what was" in _advice(model, ["optimizer.state.exp_avg.weight"])
    model[0].requires_grad_(False)
    text = _advice(model, ["optimizer.distributed.dp_group_idx_0.param"])
    assert "this run has frozen 0.weight and 1 more; freeze what was frozen when it was saved (or ddp.bucket" in text
    assert _advice(model, ["0.weight", "optimizer.state.exp_avg.weight"]).startswith("load a checkpoint of this")


@pytest.mark.parametrize("moment", ["exp_avg.weight", "exp_avg_sq.weight", "momentum_buffer.weight"])
@pytest.mark.parametrize("prefix", ["optimizer.state.", "optimizer.chained_0.optimizer.state."])
def test_optimizer_state_without_a_step_is_no_matter_of_frozen_weights(prefix, moment):
    stored = ["weight", "optimizer.fp32_param.weight"]
    text = _advice(torch.nn.Linear(2, 2), [prefix + moment], stored)
    assert text.startswith("its weights fit, and it holds no moments: ") and "in FP16, all may have overflowed" in text
    assert text.endswith("load its weights alone with checkpoint.load_optim=false")
    assert "frozen" in _advice(torch.nn.Linear(2, 2), [prefix + moment], [*stored, f"{prefix}exp_avg.bias"])
    assert "frozen" in _advice(torch.nn.Linear(2, 2), [prefix + moment, "optimizer.fp32_param.bias"], stored)
