# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How a flat slice of a parameter becomes boxes of it."""

import random

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.bridge.core_repairs.reshardable_state import _boxes_of_range, _sharded_boxes


@pytest.mark.parametrize("shape", [(7,), (1,), (5, 6), (1, 9), (3, 4, 5), (2, 1, 3, 2)])
def test_boxes_cover_a_range_in_order(shape):
    whole = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    pick = random.Random(0)
    for _ in range(50):
        start, end = sorted(pick.sample(range(whole.numel() + 1), 2))
        boxes = list(_boxes_of_range(shape, start, end))
        found = [
            whole[tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))].reshape(-1)
            for box in boxes
        ]
        assert torch.cat(found).tolist() == list(range(start, end))
        assert len(boxes) < 2 * len(shape)


def _gated(weight, build):
    return ShardedTensorFactory("w", weight, build, torch.cat, (0, 0, 0))


def test_a_gated_weight_is_cut_where_each_half_is_stored():
    """On the second of two tensor-parallel ranks, below a layer's axis: halves of 2 rows, stored 4 rows apart."""
    weight = torch.zeros(4, 3)

    def build(key, tensor, replica_id, flattened_range):
        return [
            ShardedTensor.from_rank_offsets(
                key, half, (0, 1, 2), (1, 1 + 2 * at, 4), replica_id=replica_id, prepend_axis_num=1
            )
            for at, half in enumerate(tensor.chunk(2))
        ]

    state = torch.arange(2, 11).float()
    stored = torch.full((2, 8, 3), -1.0)
    for box in _sharded_boxes(_gated(weight, build), "exp_avg", state, 2, 0):
        assert box.key == "optimizer.state.exp_avg.w" and box.global_shape == stored.shape
        stored[tuple(slice(at, at + size) for at, size in zip(box.global_offset, box.local_shape, strict=True))] = (
            box.data
        )
        assert box.data.data_ptr() in range(state.data_ptr(), state.data_ptr() + 36), "a copy would not be loaded into"
    expected = torch.full((2, 8, 3), -1.0)
    expected[1, 2:4] = torch.tensor([[-1, -1, 2], [3, 4, 5]])
    expected[1, 6:8] = torch.tensor([[6, 7, 8], [9, 10, -1]])
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("rearrange", [lambda t: [t.t()], lambda t: [t.clone()], lambda t: list(t.chunk(2, dim=1))])
def test_a_rearranged_weight_is_refused(rearrange):
    def build(key, tensor, replica_id, flattened_range):
        return [
            ShardedTensor.from_rank_offsets(f"{key}{at}", part, replica_id=replica_id)
            for at, part in enumerate(rearrange(tensor))
        ]

    with pytest.raises(RuntimeError, match="w is rearranged before it is stored.*fully_reshardable=false"):
        list(_sharded_boxes(_gated(torch.zeros(4, 6), build), "exp_avg", torch.zeros(24), 0, 0))
