# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`checkpoint.load_main_params_from_ckpt`: FP32 weights become the masters, not their 16-bit rounding."""

import pytest
import torch

from megatron.bridge.training.callbacks import Callback
from tests.rigs.on_ranks import run_finetune
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config


def _write_fp32_checkpoint(directory):
    from megatron.bridge.checkpoint.model_checkpoint import save_model_checkpoint
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.utils.distributed import model_parallel_groups

    cfg = tiny_config(directory)
    cfg.mixed_precision = None
    runtime_config_update(cfg)
    with model_parallel_groups(seed=7):
        chunks = cfg.model.provide_distributed_model(wrap_with_ddp=False)
        weights = {name: param.detach().clone() for name, param in chunks[0].named_parameters()}
        save_model_checkpoint(chunks, f"{directory}/fp32", run_config={"model": cfg.to_dict()["model"]})
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    return weights


class _Masters(Callback):
    """What the optimizer steps on before the first step: (parameter, its first element, the values)."""

    def __init__(self):
        self.found = {}

    def on_train_start(self, context):
        from megatron.core.utils import unwrap_model

        names = {param: name for name, param in unwrap_model(context.model[0]).named_parameters()}
        for child in context.optimizer.chained_optimizers:
            mains = [main for group in child.shard_fp32_from_float16_groups for main in group]
            params = [param for group in child.model_float16_groups for param in group]
            for param, main in zip(params, mains, strict=True):
                inner_of = getattr(child.optimizer, "param_to_inner_param", {main: main})
                start = child._get_model_param_range_map(param)["param"].start
                self.found[names[param]] = (start, inner_of[main].detach().clone().cpu())


def _masters_after_load(directory, offload, from_checkpoint):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    weights = _write_fp32_checkpoint(directory)
    cfg = tiny_config(
        directory,
        train_iters=1,
        optimizer={"optimizer_cpu_offload": offload, "optimizer_offload_fraction": 0.5},
        checkpoint={
            "save": None,
            "pretrained_checkpoint": f"{directory}/fp32",
            "load_optim": False,
            "load_main_params_from_ckpt": from_checkpoint,
        },
    )
    masters = _Masters()
    finetune(cfg, forward_step, callbacks=[masters])
    exact = rounded = 0
    for name, (start, master) in masters.found.items():
        stored = weights[name].reshape(-1)[start : start + master.numel()].cpu()
        exact += torch.equal(master, stored)
        rounded += torch.equal(master, stored.bfloat16().float())
    return len(masters.found), exact, rounded


@pytest.mark.parametrize("offload", [False, True])
def test_masters_hold_what_the_checkpoint_holds(tmp_path, offload):
    for count, exact, _ in run_on_ranks(_masters_after_load, 2, tmp_path, offload, True):
        assert exact == count > 5


def test_otherwise_they_hold_the_weights_rounding(tmp_path):
    for count, exact, rounded in run_on_ranks(_masters_after_load, 2, tmp_path, True, False):
        assert rounded == count
        assert exact < count


def test_a_run_can_go_on_with_it(tmp_path):
    run_on_ranks(_write_fp32_checkpoint, 2, tmp_path)
    losses = run_on_ranks(_losses, 2, tmp_path)[0]
    assert losses[-1] < losses[0]


def _losses(directory):
    checkpoint = {"save": None, "pretrained_checkpoint": f"{directory}/fp32", "load_optim": False}
    return run_finetune(
        tiny_config(directory, train_iters=4, checkpoint={**checkpoint, "load_main_params_from_ckpt": True})
    ).losses
