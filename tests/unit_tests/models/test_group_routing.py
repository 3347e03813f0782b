# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from megatron.bridge.models.deepseek_v3 import DeepSeekV3ModelProvider
from megatron.bridge.models.group_routing import GroupsByBest


@pytest.mark.parametrize(("best", "expected"), [(1, [0, 1]), (2, [2, 3])])
def test_groups_are_ranked_by_their_best(best, expected):
    """One very good expert, or two good ones."""
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.7]])
    values, chosen = GroupsByBest(best).get_replay_topk(scores, 2, 2, 1, None)
    assert sorted(chosen[0].tolist()) == expected and torch.equal(values, scores.gather(1, chosen))


def test_a_fused_router_that_ranks_otherwise_is_refused():
    provider = DeepSeekV3ModelProvider(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        moe_router_topk=3,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_fusion=True,
    )
    with pytest.raises(ValueError, match="moe_router_fusion=True ranks groups"):
        provider.finalize()
