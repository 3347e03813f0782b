# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Repairs whose defect no whole run shows on this machine: each asked for directly, on Core's own optimizers."""

import io

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs.repair import stepping_optimizers
from megatron.bridge.utils.replaced import replaced
from tests.rigs.on_ranks import (
    build_training,
    differing,
    take_step,
    weights_of,
)
from tests.rigs.ranks import run_on_ranks
from tests.rigs.resume import without_repairs
from tests.rigs.tiny import fp32_norm_layer_spec, tiny_config


def _last_norm_in_16_bits(config, vp_stage=None):
    from megatron.bridge.models.torch_norm import TorchNorm

    block = fp32_norm_layer_spec(config, vp_stage)
    block.layer_norm = TorchNorm
    return block


WITH_FP32_NORMS = {"transformer_layer_spec": fp32_norm_layer_spec}


def _offloaded(directory, *, model=None, **optimizer):
    optimizer = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, **optimizer}
    return build_training(tiny_config(directory, model=model or {}, optimizer=optimizer))[:2]


def _hybrids(optimizer):
    return [child.optimizer for child in optimizer.chained_optimizers]


def _stepped_on(optimizer):
    parts = [part for hybrid in _hybrids(optimizer) for part in hybrid.sub_optimizers]
    return [(param, part.state[param]) for part in parts for group in part.param_groups for param in group["params"]]


def _fill_an_empty_optimizer(directory):
    model, optimizer = _offloaded(directory)
    weights = weights_of(model)
    masters = [param.detach().clone() for param, _ in _stepped_on(optimizer)]
    for hybrid in _hybrids(optimizer):
        assert not hybrid.state
        hybrid.dummy_step()
        assert hybrid.state
    assert differing(weights, weights_of(model)) == {}
    for before, (param, state) in zip(masters, _stepped_on(optimizer), strict=True):
        assert torch.equal(before, param)
        assert float(state["step"]) == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_an_empty_optimizer_is_filled_without_a_step(tmp_path):
    run_on_ranks(_fill_an_empty_optimizer, 2, tmp_path)


def _sides_after_a_load(directory):
    """(parameter on the device, moments on the device) of each parameter, after what every load ends with."""
    model, optimizer = _offloaded(directory)
    take_step(model, optimizer)
    for hybrid in _hybrids(optimizer):
        hybrid._sync_hdo_state_to_sub_optimizers()
    return [
        (param.is_cuda, state["exp_avg"].is_cuda, state["exp_avg_sq"].is_cuda)
        for param, state in _stepped_on(optimizer)
    ]


def test_state_is_on_the_side_of_its_parameter(tmp_path):
    for sides in run_on_ranks(_sides_after_a_load, 2, tmp_path):
        assert set(sides) == {(True, True, True), (False, False, False)}


def _saved_param_groups(directory):
    model, optimizer = _offloaded(directory)
    take_step(model, optimizer)
    for child in optimizer.chained_optimizers:
        file = io.BytesIO()
        torch.save(child.state_dict(), file)
        file.seek(0)
        groups = torch.load(file, weights_only=True)["optimizer"]["param_groups"]
        assert groups and all(group["step"] == 1 for group in groups)


def test_saved_param_groups_are_plain_data(tmp_path):
    run_on_ranks(_saved_param_groups, 2, tmp_path)


def _state_by_parameter(directory):
    """With FP32 and 16-bit parameters in a group: what Core finds as a parameter's master is that parameter's."""
    model, optimizer = _offloaded(directory, model={"transformer_layer_spec": _last_norm_in_16_bits})
    take_step(model, optimizer)
    dtypes = {}
    for child in optimizer.chained_optimizers:
        for param, (group, _) in child.model_param_group_index_map.items():
            owned = child._get_model_param_range_map(param)["param"]
            weight = param.detach().view(-1)[owned.start : owned.end]
            master = child._get_main_param_and_optimizer_states(param)["param"]
            assert torch.equal(master.to(weight), weight)
            dtypes.setdefault(group, set()).add(param.dtype)
    return {torch.bfloat16, torch.float32} in dtypes.values()


def test_state_is_found_under_its_own_parameter(tmp_path):
    assert any(run_on_ranks(_state_by_parameter, 2, tmp_path)), "no group is mixed"


def _weights_that_stay(directory):
    """Precision-aware, FP32 weights on the device: which of them a step leaves as they are."""
    aware = {"use_precision_aware_optimizer": True, "optimizer_offload_fraction": 0.0}
    model, optimizer = _offloaded(directory, model=WITH_FP32_NORMS, **aware)
    before = weights_of(model)
    assert {weight.dtype for weight in before.values()} == {torch.bfloat16, torch.float32}
    take_step(model, optimizer)
    return sorted(before.keys() - differing(before, weights_of(model)).keys())


def test_fp32_weights_on_the_device_move(tmp_path):
    for unmoved in run_on_ranks(_weights_that_stay, 2, tmp_path):
        assert unmoved == []


def _elements_copied(directory):
    """Of the model, of this rank's part of it, and of each hybrid optimizer that makes its copies."""
    copied, make_copies = [], HybridDeviceOptimizer._init_sub_optimizers

    def count(hybrid):
        copied.append(sum(param.numel() for group in hybrid.param_groups for param in group["params"]))
        make_copies(hybrid)

    with replaced(HybridDeviceOptimizer, _init_sub_optimizers=count):
        model, optimizer = _offloaded(directory)
    of_model = sum(param.numel() for chunk in model for param in chunk.parameters())
    return of_model, sum(param.numel() for param, _ in _stepped_on(optimizer)), copied


def test_only_what_a_rank_owns_is_copied(tmp_path):
    for _, owned, copied in run_on_ranks(_elements_copied, 2, tmp_path):
        assert copied == [owned]
    for of_model, owned, copied in run_on_ranks(without_repairs, 2, ("lazy hybrid init",), _elements_copied, tmp_path):
        assert copied == [of_model, owned], "Core copies the whole model first"


def _parts_and_parameters(directory):
    """Of the host: how many optimizers step there, on how many parameters."""
    _, optimizer = _offloaded(directory, overlap_cpu_optimizer_d2h_h2d=True, optimizer_offload_fraction=1.0)
    (hybrid,) = _hybrids(optimizer)
    return len(hybrid.cpu_optimizers), len(hybrid.gpu_params_map_cpu_copy)


def test_parameters_share_an_optimizer_on_the_host(tmp_path):
    for parts, parameters in run_on_ranks(_parts_and_parameters, 2, tmp_path):
        assert 0 < 2 * parts < parameters
    for parts, parameters in run_on_ranks(without_repairs, 2, ("flat step",), _parts_and_parameters, tmp_path):
        assert parts == parameters, "Core gives each its own"


def _copies_across(directory):
    """FP32 shards: how many copies to the device a step makes, for how many of them; and how many aren't the weight."""
    model, optimizer = _offloaded(directory, optimizer_offload_fraction=1.0)
    (hybrid,) = _hybrids(optimizer)
    shards = [param for group in hybrid.param_groups for param in group["params"]]
    apart = [shard for param, shard in _shards(optimizer) if not torch.equal(shard.to(param), param)]
    crossed, copy_all, places = [], torch._foreach_copy_, {shard.data_ptr() for shard in shards}

    def count(targets, *args, **kwargs):
        crossed.append(sum(target.data_ptr() in places for target in targets))
        copy_all(targets, *args, **kwargs)

    with replaced(torch, _foreach_copy_=count):
        take_step(model, optimizer)
    return sum(crossed), len(shards), len(apart)


def _shards(optimizer):
    """(view of a 16-bit weight, its FP32 shard), on this rank."""
    for child in optimizer.chained_optimizers:
        for weights, shards in zip(child.shard_float16_groups, child.shard_fp32_from_float16_groups, strict=True):
            yield from zip(weights, shards, strict=True)


def test_shards_cross_in_few_copies(tmp_path):
    for copies, parameters, apart in run_on_ranks(_copies_across, 2, tmp_path):
        assert 1 <= copies <= 2 and parameters > 4 and apart == 0
    for copies, parameters, apart in run_on_ranks(without_repairs, 2, ("flat shards",), _copies_across, tmp_path):
        assert copies == parameters and apart == 0, "each shard crosses by itself"


def _kernels_of_adam(directory, offload):
    """Whether each part steps with torch's fused kernel: as built, and once a load brought the loop's options."""
    model, optimizer = _offloaded(directory, **offload)
    take_step(model, optimizer)
    as_built = [_is_fused(child) for child in optimizer.chained_optimizers]
    state = optimizer.state_dict()
    for child_state in state if isinstance(state, list) else [state]:
        for group in child_state["optimizer"]["param_groups"]:
            group.update(fused=False, foreach=True)
    optimizer.load_state_dict(state)
    take_step(model, optimizer)
    return as_built + [_is_fused(child) for child in optimizer.chained_optimizers]


def _is_fused(child):
    parts = stepping_optimizers(child.optimizer)
    return all(group["fused"] and not group.get("foreach") for part in parts for group in part.param_groups)


@pytest.mark.parametrize(
    "offload",
    [{"optimizer_cpu_offload": False}, {}, {"use_precision_aware_optimizer": True}],
    ids=["no offload", "FP32 shards", "precision-aware"],
)
def test_adam_steps_with_the_same_kernel_with_offload_and_without(tmp_path, offload):
    for fused in run_on_ranks(_kernels_of_adam, 2, tmp_path, offload):
        assert fused == [True, True]


def _fused_in_a_scratch_copy(directory):
    """Steps of a run without offload beside torch's fused kernel on copies of its masters."""
    model, optimizer = build_training(tiny_config(directory))[:2]
    (child,) = optimizer.chained_optimizers
    masters = [param for group in child.optimizer.param_groups for param in group["params"]]
    copies = [param.detach().clone() for param in masters]
    groups = [
        {**group, "params": [copies.pop(0) for _ in group["params"]], "fused": True}
        for group in child.optimizer.param_groups
    ]
    beside = torch.optim.AdamW(groups)
    kept = [param for group in groups for param in group["params"]]
    for seed in range(3):
        take_step(model, optimizer, seed=seed)
        for copy, master in zip(kept, masters, strict=True):
            copy.grad = master.grad.detach().clone()
        beside.step()
    return [torch.equal(copy, master) for copy, master in zip(kept, masters, strict=True)]


def test_a_run_without_offload_has_the_bits_of_the_fused_kernel(tmp_path):
    for equal in run_on_ranks(_fused_in_a_scratch_copy, 2, tmp_path):
        assert equal and all(equal)
