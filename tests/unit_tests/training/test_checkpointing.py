# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sync and its guard: with mocked optimizers for the branches, with Core's own classes for the truth."""

from unittest.mock import MagicMock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params

from megatron.bridge.training.checkpointing import (
    HybridParamSync,
    check_hybrid_optimizer_param_copies,
    sync_hybrid_optimizer_param_copies,
)
from tests.on_ranks import (
    build_training,
    fill_weights,
    take_step,
    weights_of,
)
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16)


def mocked_optimizer(*, precision_aware=False):
    """A distributed optimizer over the middle half of one weight; every copy holds zeros."""
    optimizer, hybrid = MagicMock(spec=DistributedOptimizer), MagicMock(spec=HybridDeviceOptimizer)
    shard_of_weight = WEIGHT[1:3]
    master, clone = torch.zeros(2), torch.zeros(2)
    stepped_on = shard_of_weight if precision_aware else master
    optimizer.optimizer = hybrid
    optimizer.model_float16_groups, optimizer.shard_float16_groups = [[WEIGHT]], [[shard_of_weight]]
    optimizer.shard_fp32_from_float16_groups = [[None if precision_aware else master]]
    optimizer.model_fp32_groups = optimizer.shard_fp32_groups = [[]]
    optimizer._get_model_param_range_map.return_value = {"param": MagicMock(start=1, end=3, size=2)}
    optimizer._build_model_param_to_state_dict_param_map.side_effect = lambda state: {WEIGHT: state["model"]["weight"]}
    optimizer.model_chunks = []
    hybrid.gpu_params_map_cpu_copy = {stepped_on: clone}
    hybrid.param_to_fp32_param = {shard_of_weight: clone} if precision_aware else {}
    hybrid.param_to_inner_param = {stepped_on: clone}
    hybrid.sub_optimizers = [MagicMock(param_groups=[{"params": [clone]}])]
    return optimizer, master, clone


def chained(*children):
    optimizer = MagicMock(spec=ChainedOptimizer)
    optimizer.chained_optimizers = list(children)
    return optimizer


def test_sync_hybrid_optimizer_param_copies_refreshes_shards_and_clones():
    optimizer, master, clone = mocked_optimizer()
    done = sync_hybrid_optimizer_param_copies(optimizer)
    assert master.tolist() == clone.tolist() == [2.0, 3.0]
    assert done and done.parameters == 2 and done.num_bytes == 2 * 2 * 4


def test_sync_hybrid_optimizer_param_copies_writes_a_precision_aware_master_once():
    optimizer, _, clone = mocked_optimizer(precision_aware=True)
    done = sync_hybrid_optimizer_param_copies(optimizer)
    assert clone.tolist() == [2.0, 3.0]
    assert done.parameters == 1


@pytest.mark.parametrize("precision_aware", [False, True])
def test_sync_hybrid_optimizer_param_copies_takes_the_state_dict_rather_than_rounded_weights(precision_aware):
    optimizer, master, clone = mocked_optimizer(precision_aware=precision_aware)
    exact = torch.tensor([1.001, 2.001, 3.001, 4.001])
    sync_hybrid_optimizer_param_copies(optimizer, {"model": {"weight": exact}})
    assert torch.equal(clone, exact[1:3])
    assert precision_aware or torch.equal(master, exact[1:3])


def test_sync_hybrid_optimizer_param_copies_leaves_other_optimizers_alone():
    plain = MagicMock(spec=DistributedOptimizer)
    plain.optimizer = MagicMock(spec=torch.optim.AdamW)
    stub = MagicMock(spec=DistributedOptimizer)
    stub.optimizer = None
    for optimizer in (None, plain, stub, chained(), chained(plain, stub)):
        done = sync_hybrid_optimizer_param_copies(optimizer)
        assert not done and done == HybridParamSync()
    assert plain.method_calls == [] and plain.optimizer.method_calls == []


def test_sync_hybrid_optimizer_param_copies_finds_hybrids_at_any_depth():
    first, _, first_clone = mocked_optimizer()
    second, _, second_clone = mocked_optimizer()
    plain = MagicMock(spec=DistributedOptimizer)
    plain.optimizer = MagicMock(spec=torch.optim.AdamW)
    done = sync_hybrid_optimizer_param_copies(chained(first, chained(plain, chained(second))))
    assert first_clone.tolist() == second_clone.tolist() == [2.0, 3.0]
    assert done.parameters == 4


@pytest.mark.parametrize("name", ["gpu_params_map_cpu_copy", "param_to_fp32_param", "param_to_inner_param"])
def test_sync_hybrid_optimizer_param_copies_says_which_attribute_is_gone(name):
    optimizer, _, _ = mocked_optimizer()
    delattr(optimizer.optimizer, name)
    with pytest.raises(RuntimeError, match=rf"{name} is missing in megatron-core .*use megatron-core 0.16.1 to 0.19.2"):
        sync_hybrid_optimizer_param_copies(optimizer)


def test_sync_hybrid_optimizer_param_copies_refuses_a_state_dict_of_another_shape():
    optimizer, _, _ = mocked_optimizer()
    with pytest.raises(RuntimeError, match=r"shape \(4,\) in the model and \(5,\) in the state dict"):
        sync_hybrid_optimizer_param_copies(optimizer, {"model": {"weight": torch.zeros(5)}})


@pytest.mark.parametrize("precision_aware", [False, True])
def test_guard_names_the_stale_parameter(precision_aware):
    optimizer, master, _ = mocked_optimizer(precision_aware=precision_aware)
    chunk = MagicMock()
    chunk.named_parameters.return_value = [("decoder.weight", WEIGHT)]
    optimizer.model_chunks = [chunk]
    with pytest.raises(RuntimeError, match=r"decoder.weight on rank 0 .*0.0 in the copy and 2.0 in the weight"):
        check_hybrid_optimizer_param_copies(optimizer, exact=True)
    sync_hybrid_optimizer_param_copies(optimizer)
    assert check_hybrid_optimizer_param_copies(optimizer, exact=True) == 1


def test_guard_lets_restored_masters_hold_bits_that_the_weights_lost():
    optimizer, master, clone = mocked_optimizer()
    for copy in (master, clone):
        copy.copy_(torch.tensor([2.001, 3.001]))
    assert check_hybrid_optimizer_param_copies(optimizer, exact=False) == 1
    with pytest.raises(RuntimeError, match="is not the loaded weight"):
        check_hybrid_optimizer_param_copies(optimizer, exact=True)


@pytest.mark.parametrize("stale", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
def test_guard_looks_at_every_copy(stale, exact):
    optimizer, *copies = mocked_optimizer()
    sync_hybrid_optimizer_param_copies(optimizer)
    copies[stale][1] = 3.1
    with pytest.raises(RuntimeError, match=r"element 1 of its slice is 3.0\d* in the copy and 3.0 in the weight"):
        check_hybrid_optimizer_param_copies(optimizer, exact=exact)


def test_sync_hybrid_optimizer_param_copies_refuses_what_it_does_not_know():
    optimizer, _, _ = mocked_optimizer()
    optimizer.optimizer.param_to_inner_param = {}
    with pytest.raises(RuntimeError, match="has no entry in HybridDeviceOptimizer.param_to_inner_param"):
        sync_hybrid_optimizer_param_copies(optimizer)
    optimizer, master, _ = mocked_optimizer()
    optimizer.optimizer.param_to_inner_param = {master: torch.zeros(2)}
    with pytest.raises(RuntimeError, match="has a sub-optimizer's tensor that is none of its known copies"):
        sync_hybrid_optimizer_param_copies(optimizer)
    optimizer, _, clone = mocked_optimizer()
    optimizer.optimizer.sub_optimizers = [MagicMock(param_groups=[{"params": [clone, torch.zeros(2)]}])]
    with pytest.raises(RuntimeError, match="steps on 2 tensors, of which 1 belong to known parameters"):
        sync_hybrid_optimizer_param_copies(optimizer)
    other = MagicMock(spec=Float16OptimizerWithFloat16Params)
    other.optimizer = MagicMock(spec=HybridDeviceOptimizer)
    with pytest.raises(RuntimeError, match="only the distributed optimizer's copies can be refreshed"):
        sync_hybrid_optimizer_param_copies(other)


def test_sync_hybrid_optimizer_param_copies_takes_quantised_weights_through_cores_dequantiser(monkeypatch):
    from megatron.core import fp8_utils

    values = torch.tensor([10.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda tensor: tensor is WEIGHT)
    monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", lambda tensor: {WEIGHT: values}[tensor])
    optimizer, master, clone = mocked_optimizer()
    sync_hybrid_optimizer_param_copies(optimizer)
    assert master.tolist() == clone.tolist() == [20.0, 30.0]
    assert check_hybrid_optimizer_param_copies(optimizer, exact=True) == 1
    master.zero_()
    assert check_hybrid_optimizer_param_copies(optimizer, exact=False) == 0, "no rounding gives quantised bits"
    with pytest.raises(RuntimeError, match="0.0 in the copy and 20.0 in the weight"):
        check_hybrid_optimizer_param_copies(optimizer, exact=True)


def test_sync_hybrid_optimizer_param_copies_gives_each_optimizer_its_chunks_of_a_state_dict():
    children = []
    for index in range(2):
        child, _, clone = mocked_optimizer()
        child.model_chunks = [f"chunk {index}"]
        child._build_model_param_to_state_dict_param_map.side_effect = lambda state: {WEIGHT: state["model0"]["weight"]}
        children.append((child, clone))
    state = {f"model{index}": {"weight": torch.full((4,), 5.0 + index)} for index in range(2)}
    sync_hybrid_optimizer_param_copies(chained(children[0][0], chained(children[1][0])), state)
    assert [clone.tolist() for _, clone in children] == [[5.0, 5.0], [6.0, 6.0]]


# The same with Core's own classes, on ranks of the simulated accelerator (or CUDA).


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
