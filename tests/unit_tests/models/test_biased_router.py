# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest

from megatron.bridge.models.biased_router import biased_router_fields

HF = {
    "architectures": ["Glm4MoeForCausalLM"],
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
}


def test_fields():
    assert biased_router_fields(HF) == {
        "num_moe_experts": 8,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 20,
        "moe_shared_expert_intermediate_size": 40,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_topk_scaling_factor": 1.7,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_pre_softmax": False,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"first_k_dense_replace": 4}, {"num_moe_experts": None, "moe_router_enable_expert_bias": False}),
        ({"first_k_dense_replace": 0}, {"moe_layer_freq": [1, 1, 1, 1]}),
        ({"n_shared_experts": 0}, {"moe_shared_expert_intermediate_size": None}),
        ({"n_group": 1, "topk_group": 1}, {"moe_router_num_groups": None, "moe_router_group_topk": None}),
        ({"topk_group": 4}, {"moe_router_num_groups": None, "moe_router_group_topk": None}),  # all groups
        ({"num_experts_per_tok": 1, "n_group": 1, "norm_topk_prob": False}, {"moe_router_topk": 1}),
    ],
    ids=["all dense", "all with experts", "no shared expert", "no groups", "all groups", "one expert"],
)
def test_forms(changes, expected):
    fields = biased_router_fields({**HF, **changes})
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"topk_group": 1}, "num_experts_per_tok=4 out of topk_group=1 of n_group=4"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"num_experts_per_tok": 1, "n_group": 1}, "norm_topk_prob=True"),
    ],
)
def test_what_cores_router_cannot_do_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        biased_router_fields({**HF, **changes})
