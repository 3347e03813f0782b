# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A family's table in the words of Megatron Bridge is the table of `mapping.py`."""

import pytest

from megatron.bridge.models.conversion import mapping
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ColumnParallelMapping,
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)

LAYER, HF = "decoder.layers.*.", "model.layers.*."


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("embedding.word_embeddings.weight", mapping.vocabulary),
        ("output_layer.weight", mapping.vocabulary),
        ("decoder.final_layernorm.weight", mapping.replicated),
        ("self_attention.linear_qkv.layer_norm_weight", mapping.replicated),
        ("self_attention.q_layernorm.weight", mapping.replicated),
        ("mlp.router.weight", mapping.replicated),
        ("mlp.linear_fc2.bias", mapping.replicated),
        ("self_attention.linear_proj.weight", mapping.split_columns),
        ("mlp.linear_fc2.weight", mapping.split_columns),
        ("mlp.linear_fc1.weight", mapping.split_rows),
        ("mlp.linear_fc1.bias", mapping.split_rows),
    ],
)
def test_a_name_says_how_ranks_share_its_weight(name, row):
    assert AutoMapping(megatron_param=name, hf_param="x").to_weight_mapping() == row(name, "x")


def test_experts_have_a_second_number():
    found = AutoMapping(f"{LAYER}mlp.experts.linear_fc2.weight*", f"{HF}mlp.experts.*.down.weight").to_weight_mapping()
    assert found.at_layer(3, 7).megatron_name == "decoder.layers.3.mlp.experts.linear_fc2.weight7"
    assert found.at_layer(3, 7).hf_names == ("model.layers.3.mlp.experts.7.down.weight",)
    assert found.layout is mapping.split_columns("a", "b").layout and found.dim == 1


def test_several_tensors_in_one_weight():
    qkv = QKVMapping(megatron_param=f"{LAYER}qkv", q=f"{HF}q", k=f"{HF}k", v=f"{HF}v").to_weight_mapping()
    names = {kind: f"model.layers.{{layer}}.{kind}" for kind in "qkv"}
    assert qkv == mapping.fused_qkv("decoder.layers.{layer}.qkv", **names)
    gated = GatedMLPMapping(megatron_param="m", gate="g", up="u").to_weight_mapping()
    assert gated == mapping.fused_gate_up("m", gate="g", up="u")


def test_a_script_may_say_how_ranks_share_a_weight():
    rows = [
        kind("mine", "x").to_weight_mapping() for kind in (ReplicatedMapping, ColumnParallelMapping, RowParallelMapping)
    ]
    assert [row.dim for row in rows] == [None, 0, 1]


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="doesn't know how ranks share 'mine': take ReplicatedMapping"):
        AutoMapping("mine", "x").to_weight_mapping()
    with pytest.raises(ValueError, match="has 3 numbers"):
        ReplicatedMapping("*.*.*", "x").to_weight_mapping()
