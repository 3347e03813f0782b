# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""An offloaded optimizer's copies and their guard, branch by branch, on mocked optimizers.

Nothing but torch, megatron-core and pytest is needed, and nothing of ours but the module under test.
"""

from unittest.mock import MagicMock

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)

from megatron.bridge.training.cpu_offload.param_copies import (
    HybridParamSync,
    check_hybrid_optimizer_param_copies,
    find_hybrid_optimizers,
    rebuild_param_copies,
)

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


def test_rebuild_refreshes_shards_and_clones():
    optimizer, master, clone = mocked_optimizer()
    done = rebuild_param_copies(optimizer)
    assert master.tolist() == clone.tolist() == [2.0, 3.0]
    assert done and done.parameters == 2 and done.num_bytes == 2 * 2 * 4


def test_rebuild_writes_a_precision_aware_master_once():
    optimizer, _, clone = mocked_optimizer(precision_aware=True)
    done = rebuild_param_copies(optimizer)
    assert clone.tolist() == [2.0, 3.0]
    assert done.parameters == 1


@pytest.mark.parametrize("precision_aware", [False, True])
def test_rebuild_takes_the_state_dict_rather_than_rounded_weights(precision_aware):
    optimizer, master, clone = mocked_optimizer(precision_aware=precision_aware)
    exact = torch.tensor([1.001, 2.001, 3.001, 4.001])
    rebuild_param_copies(optimizer, {"model": {"weight": exact}})
    assert torch.equal(clone, exact[1:3])
    assert precision_aware or torch.equal(master, exact[1:3])


def test_rebuild_leaves_other_optimizers_alone():
    plain = MagicMock(spec=DistributedOptimizer)
    plain.optimizer = MagicMock(spec=torch.optim.AdamW)
    stub = MagicMock(spec=DistributedOptimizer)
    stub.optimizer = None
    for optimizer in (None, plain, stub, chained(), chained(plain, stub)):
        done = rebuild_param_copies(optimizer)
        assert not done and done == HybridParamSync()
    assert plain.method_calls == [] and plain.optimizer.method_calls == []


def test_rebuild_finds_hybrids_at_any_depth():
    first, _, first_clone = mocked_optimizer()
    second, _, second_clone = mocked_optimizer()
    plain = MagicMock(spec=DistributedOptimizer)
    plain.optimizer = MagicMock(spec=torch.optim.AdamW)
    done = rebuild_param_copies(chained(first, chained(plain, chained(second))))
    assert first_clone.tolist() == second_clone.tolist() == [2.0, 3.0]
    assert done.parameters == 4


@pytest.mark.parametrize("name", ["gpu_params_map_cpu_copy", "param_to_fp32_param", "param_to_inner_param"])
def test_rebuild_says_which_attribute_is_gone(name):
    optimizer, _, _ = mocked_optimizer()
    delattr(optimizer.optimizer, name)
    with pytest.raises(RuntimeError, match=rf"{name} is missing in megatron-core .*use megatron-core 0.16.1 to 0.20"):
        rebuild_param_copies(optimizer)


def test_rebuild_refuses_a_state_dict_of_another_shape():
    optimizer, _, _ = mocked_optimizer()
    with pytest.raises(RuntimeError, match=r"shape \(4,\) in the model and \(5,\) in the state dict"):
        rebuild_param_copies(optimizer, {"model": {"weight": torch.zeros(5)}})


@pytest.mark.parametrize("precision_aware", [False, True])
def test_guard_names_the_stale_parameter(precision_aware):
    optimizer, master, _ = mocked_optimizer(precision_aware=precision_aware)
    chunk = MagicMock()
    chunk.named_parameters.return_value = [("decoder.weight", WEIGHT)]
    optimizer.model_chunks = [chunk]
    with pytest.raises(RuntimeError, match=r"decoder.weight on rank 0 .*0.0 in the copy and 2.0 in the weight"):
        check_hybrid_optimizer_param_copies(optimizer, exact=True)
    rebuild_param_copies(optimizer)
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
    rebuild_param_copies(optimizer)
    copies[stale][1] = 3.1
    with pytest.raises(RuntimeError, match=r"element 1 of its slice is 3.0\d* in the copy and 3.0 in the weight"):
        check_hybrid_optimizer_param_copies(optimizer, exact=exact)


def test_rebuild_refuses_what_it_does_not_know():
    optimizer, _, _ = mocked_optimizer()
    optimizer.optimizer.param_to_inner_param = {}
    with pytest.raises(RuntimeError, match="has no entry in HybridDeviceOptimizer.param_to_inner_param"):
        rebuild_param_copies(optimizer)
    optimizer, master, _ = mocked_optimizer()
    optimizer.optimizer.param_to_inner_param = {master: torch.zeros(2)}
    with pytest.raises(RuntimeError, match="has a sub-optimizer's tensor that is none of its known copies"):
        rebuild_param_copies(optimizer)
    optimizer, _, clone = mocked_optimizer()
    optimizer.optimizer.sub_optimizers = [MagicMock(param_groups=[{"params": [clone, torch.zeros(2)]}])]
    with pytest.raises(RuntimeError, match="steps on 2 tensors, of which 1 belong to known parameters"):
        rebuild_param_copies(optimizer)
    other = MagicMock(spec=Float16OptimizerWithFloat16Params)
    other.optimizer = MagicMock(spec=HybridDeviceOptimizer)
    with pytest.raises(RuntimeError, match="only the distributed optimizer's copies can be refreshed"):
        rebuild_param_copies(other)


@pytest.mark.parametrize("kind", ["alone", "grouped"])
def test_rebuild_takes_quantised_weights_as_core_reads_them(monkeypatch, kind):
    values = torch.tensor([10.0, 20.0, 30.0, 40.0])
    is_weight = staticmethod(lambda tensor: tensor is WEIGHT)
    if hasattr(DistributedOptimizer, "_is_distopt_quantized_param"):
        monkeypatch.setattr(DistributedOptimizer, "_is_distopt_quantized_param", is_weight)
    elif kind == "grouped":
        pytest.skip("this megatron-core keeps no grouped weights quantised")
    if kind == "grouped":
        monkeypatch.setattr(DistributedOptimizer, "_is_grouped_quantized_tensor", is_weight)
        monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", None)
        values = WEIGHT.float()
    else:
        monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda tensor: tensor is WEIGHT)
        monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", lambda tensor: {WEIGHT: values}[tensor])
    optimizer, master, clone = mocked_optimizer()
    rebuild_param_copies(optimizer)
    assert master.tolist() == clone.tolist() == values[1:3].tolist()
    assert check_hybrid_optimizer_param_copies(optimizer, exact=True) == 1
    master.zero_()
    assert check_hybrid_optimizer_param_copies(optimizer, exact=False) == 0, "no rounding gives quantised bits"
    with pytest.raises(RuntimeError, match=rf"0.0 in the copy and {values[1]} in the weight"):
        check_hybrid_optimizer_param_copies(optimizer, exact=True)


def first_chunks_weight(state):
    return {WEIGHT: state["model0"]["weight"]}


def test_rebuild_gives_each_optimizer_its_chunks_of_a_state_dict():
    children = []
    for index in range(2):
        child, _, clone = mocked_optimizer()
        child.model_chunks = [f"chunk {index}"]
        child._build_model_param_to_state_dict_param_map.side_effect = first_chunks_weight
        children.append((child, clone))
    state = {f"model{index}": {"weight": torch.full((4,), 5.0 + index)} for index in range(2)}
    rebuild_param_copies(chained(children[0][0], chained(children[1][0])), state)
    assert [clone.tolist() for _, clone in children] == [[5.0, 5.0], [6.0, 6.0]]


def test_rebuild_says_which_chunk_a_state_dict_lacks():
    first, second = mocked_optimizer()[0], mocked_optimizer()[0]
    first.model_chunks, second.model_chunks = ["chunk 0"], ["chunk 1"]
    first._build_model_param_to_state_dict_param_map.side_effect = first_chunks_weight
    with pytest.raises(RuntimeError, match="the state dict has no model1, and the model has 2 chunks"):
        rebuild_param_copies(chained(first, second), {"model0": {"weight": torch.zeros(4)}})


def mimo(**optimizers):
    """An optimizer of Core 0.19's shape for several modules: no chain, and none of its own."""
    optimizer = MagicMock(spec=MegatronOptimizer)
    optimizer.optimizer, optimizer.is_stub_optimizer = None, False
    optimizer.module_infos = {
        name: MagicMock(optimizer=child, is_active=child is not None) for name, child in optimizers.items()
    }
    return optimizer


def test_rebuild_finds_the_optimizers_of_a_mimo_models_modules():
    vision, _, vision_clone = mocked_optimizer()
    language, _, language_clone = mocked_optimizer()
    optimizer = mimo(vision=vision, language=chained(language), sound=None)
    assert find_hybrid_optimizers(optimizer) == [vision, language]
    assert rebuild_param_copies(optimizer).parameters == 4
    assert vision_clone.tolist() == language_clone.tolist() == [2.0, 3.0]
    assert check_hybrid_optimizer_param_copies(optimizer, exact=True) == 2


def test_rebuild_leaves_a_mimo_module_alone_that_other_ranks_train():
    optimizer = mimo(vision=mocked_optimizer()[0])
    optimizer.module_infos["vision"].is_active = False
    assert not rebuild_param_copies(optimizer)


def test_rebuild_hands_each_mimo_module_the_whole_state_dict():
    """Core matches a module's names at the end of the model's; its chunks are not numbered among the others'."""
    vision, _, vision_clone = mocked_optimizer()
    language, _, language_clone = mocked_optimizer()
    vision.model_chunks, language.model_chunks = ["vision"], ["language"]
    rebuild_param_copies(mimo(vision=vision, language=language), {"model": {"weight": torch.full((4,), 5.0)}})
    assert vision_clone.tolist() == language_clone.tolist() == [5.0, 5.0]


def test_rebuild_refuses_an_optimizer_whose_own_it_cannot_find():
    unknown = MagicMock(spec=MegatronOptimizer)
    unknown.optimizer, unknown.is_stub_optimizer = None, False
    with pytest.raises(RuntimeError, match="keeps its optimizers where they can't be found") as raised:
        rebuild_param_copies(chained(mocked_optimizer()[0], unknown))
    assert "\n" not in str(raised.value)
    unknown.is_stub_optimizer = True
    assert not rebuild_param_copies(unknown)


def test_rebuild_looks_at_all_optimizers_before_it_writes():
    optimizer, master, _ = mocked_optimizer()
    other = MagicMock(spec=Float16OptimizerWithFloat16Params)
    other.optimizer = MagicMock(spec=HybridDeviceOptimizer)
    with pytest.raises(RuntimeError, match="only the distributed optimizer's copies"):
        rebuild_param_copies(chained(optimizer, other))
    assert master.tolist() == [0.0, 0.0]


def test_rebuild_writes_the_hybrid_members_of_a_mixed_chain_alone():
    """The others' masters are those of `reload_model_params`, which a load calls first."""
    hybrid, _, clone = mocked_optimizer()
    plain, of_fp32 = MagicMock(spec=DistributedOptimizer), MagicMock(spec=FP32Optimizer)
    plain.optimizer = of_fp32.optimizer = MagicMock(spec=torch.optim.AdamW)
    own = plain.shard_fp32_from_float16_groups = [[torch.zeros(2)]]
    chain = chained(chained(of_fp32), hybrid, plain, torch.optim.SGD([torch.zeros(1)]))
    assert rebuild_param_copies(chain).parameters == 2
    assert clone.tolist() == [2.0, 3.0] and own[0][0].tolist() == [0.0, 0.0]
    chain.reload_model_params.assert_not_called()
