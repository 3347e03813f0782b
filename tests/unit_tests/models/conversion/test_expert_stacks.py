# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge.models.conversion.expert_stacks import (
    names_when_exported,
    open_weights,
    stack_experts,
    stacked_sizes,
)
from megatron.bridge.models.conversion.mxfp4 import dequantize
from megatron.bridge.models.gpt_oss import FAMILY
from megatron.bridge.models.qwen3_5_moe import FAMILY as QWEN

pytestmark = pytest.mark.any_core

NUM_EXPERTS, INPUTS, OUTPUTS = 3, 64, 5
EXPERTS = "model.layers.7.mlp.experts."


@pytest.fixture
def plain(tmp_path):
    """A directory with one layer's stacks as they are published in bf16, and its tensors."""
    tensors = {
        f"{EXPERTS}gate_up_proj": torch.randn(NUM_EXPERTS, INPUTS, 2 * OUTPUTS),
        f"{EXPERTS}gate_up_proj_bias": torch.randn(NUM_EXPERTS, 2 * OUTPUTS),
        f"{EXPERTS}down_proj": torch.randn(NUM_EXPERTS, OUTPUTS, INPUTS),
        "model.norm.weight": torch.randn(INPUTS),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def quantized(directory, **changed):
    """A directory with a quantised stack of gates, and its two tensors."""
    blocks = torch.randint(0, 256, (NUM_EXPERTS, 2 * OUTPUTS, INPUTS // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (NUM_EXPERTS, 2 * OUTPUTS, INPUTS // 32), dtype=torch.uint8)
    tensors = {f"{EXPERTS}gate_up_proj_blocks": blocks, f"{EXPERTS}gate_up_proj_scales": scales, **changed}
    save_file({name: one for name, one in tensors.items() if one is not None}, directory / "model.safetensors")
    return open_weights(directory, FAMILY.expert_stacks), blocks, scales


def test_a_stack_is_read_expert_by_expert_and_put_together_again(plain):
    directory, tensors = plain
    weights = open_weights(directory, FAMILY.expert_stacks)
    assert len(weights.files) == NUM_EXPERTS * 5 + 1
    gate_up = tensors[f"{EXPERTS}gate_up_proj"]
    assert torch.equal(weights.read(f"{EXPERTS}2.up_proj.weight"), gate_up[2, :, 1::2].t())
    assert torch.equal(weights.read(f"{EXPERTS}1.gate_proj.bias"), tensors[f"{EXPERTS}gate_up_proj_bias"][1, ::2])
    for name in weights.files:
        assert weights.read(name).shape == weights.shape(name) and weights.dtype(name) == "F32"
    parts = [(name, weights.read(name)) for name in reversed(list(weights.files))]
    stacked = dict(stack_experts(parts, FAMILY.expert_stacks, num_experts=NUM_EXPERTS))
    assert stacked.keys() == tensors.keys() and all(torch.equal(stacked[name], tensors[name]) for name in tensors)
    assert stacked_sizes([(n, t.nbytes) for n, t in parts], FAMILY.expert_stacks) == [
        (name, tensor.nbytes) for name, tensor in stacked.items()
    ]


def test_a_part_of_a_stack_is_not_exported(plain):
    weights = open_weights(plain[0], FAMILY.expert_stacks)
    some = [(name, weights.read(name)) for name in weights.files if ".experts.2." not in name]
    with pytest.raises(ValueError, match=r"down_proj is one tensor of all 3 experts, and 2 of their weights"):
        dict(stack_experts(some, FAMILY.expert_stacks, num_experts=NUM_EXPERTS))


def test_a_quantised_stack_is_read_as_bf16(tmp_path):
    weights, blocks, scales = quantized(tmp_path)
    name = f"{EXPERTS}2.up_proj.weight"
    assert (
        weights.shape(name) == (OUTPUTS, INPUTS)
        and weights.dtype(name) == "BF16"
        and len(weights.files) == NUM_EXPERTS * 2
    )
    assert torch.equal(weights.read(name), dequantize(blocks[2], scales[2])[1::2])
    stored = [f"{EXPERTS}gate_up_proj_blocks", f"{EXPERTS}gate_up_proj_scales", "model.x_blocks", "model.norm.weight"]
    assert names_when_exported(stored, FAMILY.expert_stacks) == {
        f"{EXPERTS}gate_up_proj",
        "model.x_blocks",
        "model.norm.weight",
    }


@pytest.mark.parametrize("rows", [2 * OUTPUTS, 2 * OUTPUTS + 1], ids=["whole", "a row too many"])
def test_parts_may_follow_each_other(tmp_path, rows):
    """As in Qwen3.5's published files, whose exports have the experts one by one."""
    gate_up, down = torch.randn(NUM_EXPERTS, rows, INPUTS), torch.randn(NUM_EXPERTS, INPUTS, OUTPUTS)
    save_file({f"{EXPERTS}gate_up_proj": gate_up, f"{EXPERTS}down_proj": down}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path, QWEN.stacks_in_files)
    for name in weights.files:
        assert weights.read(name).shape == weights.shape(name)
    first = rows - OUTPUTS
    assert torch.equal(weights.read(f"{EXPERTS}1.gate_proj.weight"), gate_up[1, :first])
    assert torch.equal(weights.read(f"{EXPERTS}2.up_proj.weight"), gate_up[2, first:])
    assert torch.equal(weights.read(f"{EXPERTS}0.down_proj.weight"), down[0])
    stored = [f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj"]
    assert names_when_exported(stored, (), read_stacks=QWEN.read_stacks, num_experts=NUM_EXPERTS) == set(weights.files)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "and no file holds 'model.layers.7.mlp.experts.gate_up_proj_scales'"),
        (torch.zeros(NUM_EXPERTS, 2 * OUTPUTS, 7, dtype=torch.uint8), r"has \(3, 10, 7\).*expected MXFP4"),
        (torch.zeros(NUM_EXPERTS, 2 * OUTPUTS, 2), r"dtypes \['F32', 'U8'\].*expected MXFP4"),
    ],
)
def test_blocks_need_scales_of_their_own(tmp_path, scales, message):
    weights = quantized(tmp_path, **{f"{EXPERTS}gate_up_proj_scales": scales})[0]
    with pytest.raises(ValueError, match=message):
        weights.files  # noqa: B018
