# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adapters beside what files have in one tensor."""

import pytest

from megatron.bridge.models.conversion.adapters import _adapter_mapping
from megatron.bridge.models.families import family_of


def test_an_adapter_of_a_part_of_one_tensor_has_no_place_in_peft():
    mappings = {one.megatron_name: one for one in family_of({"architectures": ["Phi3ForCausalLM"]}).mappings}
    for name, part, tensor in (
        ("self_attention.linear_qkv", "adapter_k", "self_attn.qkv_proj"),
        ("mlp.linear_fc1", "adapter_up", "mlp.gate_up_proj"),
    ):
        of_weight = mappings[f"decoder.layers.{{layer}}.{name}.weight"].at_layer(3)
        whole = _adapter_mapping(of_weight, "linear_out.weight")
        assert whole.hf_names == (f"base_model.model.model.layers.3.{tensor}.lora_B.weight",)
        with pytest.raises(ValueError, match=rf"layers\.3\.{tensor}\.weight is one tensor in files, .*{part}"):
            _adapter_mapping(of_weight, f"{part}.linear_out.weight")
