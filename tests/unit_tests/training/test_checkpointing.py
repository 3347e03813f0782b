# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sync and its guard on Core's own classes, on ranks of the simulated accelerator (or CUDA).

Their branches, with mocked optimizers, are in test_param_copies.py; when a load calls them, in
test_masters_after_load.py.
"""

import pytest
import torch

from megatron.bridge.training.checkpointing import (
    check_hybrid_optimizer_param_copies,
    sync_hybrid_optimizer_param_copies,
)
from tests.rigs.on_ranks import (
    build_training,
    fill_weights,
    take_step,
    weights_of,
)
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config


def _offloaded_run(directory, fraction, overlap, **optimizer):
    cfg = tiny_config(
        directory,
        optimizer={
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": fraction,
            "overlap_cpu_optimizer_d2h_h2d": overlap,
            **optimizer,
        },
    )
    return (*build_training(cfg), cfg)


def _every_inner_parameter(optimizer):
    """(what a sub-optimizer steps on, this rank's slice of the weight), both FP32 in host memory."""
    for child in optimizer.chained_optimizers:
        for weights, mains in zip(child.shard_float16_groups, child.shard_fp32_from_float16_groups, strict=True):
            for weight, main in zip(weights, mains, strict=True):
                inner = child.optimizer.param_to_inner_param[weight if main is None else main]
                yield inner.detach().float().cpu(), weight.detach().float().cpu()


def _copies_follow_the_weights(directory, fraction, overlap, precision_aware):
    model, optimizer, _, cfg = _offloaded_run(
        directory, fraction, overlap, use_precision_aware_optimizer=precision_aware
    )
    take_step(model, optimizer)
    moments = [
        state["exp_avg"].clone()
        for child in optimizer.chained_optimizers
        for sub_optimizer in child.optimizer.sub_optimizers
        for state in sub_optimizer.state.values()
    ]
    fill_weights(model, seed=7)
    stale = sum(not torch.equal(inner, weight) for inner, weight in _every_inner_parameter(optimizer))
    done = sync_hybrid_optimizer_param_copies(optimizer)
    again = sync_hybrid_optimizer_param_copies(optimizer)
    assert done.parameters == again.parameters > 0
    pairs = list(_every_inner_parameter(optimizer))
    assert len(pairs) > 5 and all(torch.equal(inner, weight) for inner, weight in pairs)
    assert check_hybrid_optimizer_param_copies(optimizer, exact=True) == len([p for p in pairs if p[1].numel()])
    kept = [
        state["exp_avg"]
        for child in optimizer.chained_optimizers
        for sub_optimizer in child.optimizer.sub_optimizers
        for state in sub_optimizer.state.values()
    ]
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))
    before = weights_of(model)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    take_step(model, optimizer, seed=1)
    after = weights_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return stale


def _fp32_state_dict_becomes_the_masters(directory):
    model, optimizer, _, cfg = _offloaded_run(directory, 1.0, False)
    from megatron.core.utils import unwrap_model

    exact = {
        name: torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
        for index, (name, param) in enumerate(unwrap_model(model[0]).named_parameters())
    }
    with torch.no_grad():
        for name, param in unwrap_model(model[0]).named_parameters():
            param.copy_(exact[name])
    sync_hybrid_optimizer_param_copies(optimizer, {"model": exact})
    check_hybrid_optimizer_param_copies(optimizer, exact=False)
    rounded = [not torch.equal(inner, weight) for inner, weight in _every_inner_parameter(optimizer) if weight.numel()]
    assert all(rounded)
    try:
        check_hybrid_optimizer_param_copies(optimizer, exact=True)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("precision_aware", [False, True])
@pytest.mark.parametrize(("fraction", "overlap"), [(0.0, False), (0.5, False), (0.5, True), (1.0, False), (1.0, True)])
def test_sync_hybrid_optimizer_param_copies_on_real_optimizers(tmp_path, fraction, overlap, precision_aware):
    for stale in run_on_ranks(_copies_follow_the_weights, 2, tmp_path, fraction, overlap, precision_aware):
        assert stale > 0


def test_sync_hybrid_optimizer_param_copies_keeps_fp32_of_a_real_state_dict(tmp_path):
    for message in run_on_ranks(_fp32_state_dict_becomes_the_masters, 2, tmp_path):
        assert "is not the loaded weight" in message
