# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The table that a script registers knows Core's local layers and Transformer Engine's."""

import pytest

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import AutoMapping

LAYER, HF = "decoder.layers.*.", "model.layers.*."
PAIRS = [
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("mlp.experts.linear_fc2.weight*", "mlp.experts.local_experts.*.linear_fc2.weight"),
]


@pytest.mark.parametrize(("first", "second"), [*PAIRS, *((b, a) for a, b in PAIRS)])
def test_a_weight_with_two_names_is_named_once(first, second):
    hf = f"{HF}experts.*.x" if "experts" in first else f"{HF}x"
    registry = MegatronMappingRegistry(AutoMapping(f"{LAYER}{first}", hf))
    assert len(registry) == len(list(registry)) == len(registry.get_all_mappings()) == 1
    one, other = registry.weight_mappings()
    expected = AutoMapping(f"{LAYER}{second}", hf).to_weight_mapping()
    assert other == expected and (one.hf_names, one.layout, one.dim) == (other.hf_names, other.layout, other.dim)


def test_a_table_with_both_names_keeps_them():
    both = [AutoMapping(f"{LAYER}{name}", f"{HF}{name}") for name in PAIRS[0]]
    rows = MegatronMappingRegistry(*both).weight_mappings()
    assert [row.hf_names[0].rpartition("{layer}.")[2] for row in rows] == list(PAIRS[0])


def test_two_mappings_of_one_weight_are_refused():
    twice = AutoMapping("output_layer.weight", "lm_head.weight")
    with pytest.raises(ValueError, match="two mappings are for 'output_layer.weight'"):
        MegatronMappingRegistry(twice, twice)
