# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What OLMo, Seed-OSS and Granite can't express is refused by name, in one line."""

import pytest

from megatron.bridge import AutoBridge
from megatron.bridge.models.olmo2 import OLMo2ModelProvider
from megatron.bridge.models.olmo3 import FAMILY as OLMO3
from megatron.bridge.models.olmo3 import OLMo3ModelProvider
from tests.rigs.families import MODELS
from tests.unit_tests.models.tiny_llama import SMALL

SLIDING_YARN = {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("olmo2", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("olmo3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("olmo3", {"rope_parameters": SLIDING_YARN}, "rope_type='linear' of sliding_attention is not supported"),
        ("seed_oss", {"mlp_bias": True}, "attention_bias=True, attention_out_bias=False, mlp_bias=True is not"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias=True, mlp_bias=False is not supported"),
        ("granite4", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("granite4", {"layer_types": ["attention", "mamba"] * 2}, "layer_types names .*, and Mamba layers are not"),
        ("granite4", {"num_local_experts": 8, "num_experts_per_tok": 2}, "num_local_experts=8 is not supported"),
        ("granite", {"mlp_bias": False}, "attention_bias=True with mlp_bias=False is not supported"),
    ],
)
def test_what_a_file_asks_for_and_core_lacks_is_refused(name, overrides, message):
    model = MODELS[name]
    config = {**SMALL, **model.options, **overrides, "architectures": [model.architecture]}
    with pytest.raises(ValueError, match=message) as raised:
        AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_model_parallel_size": 4, "num_query_groups": 2}, "tensor_model_parallel_size=4 with model.num_query"),
        ({"qk_layernorm": True}, "model.qk_layernorm=True: the family normalises"),
    ],
)
def test_norms_over_other_channels_than_those_of_all_heads_are_refused(fields, message):
    provider = OLMo2ModelProvider(num_layers=2, hidden_size=32, num_attention_heads=8, **fields)
    with pytest.raises(ValueError, match=message):
        provider.finalize()


def test_a_changed_base_is_written_to_an_old_file_that_leaves_the_other_out():
    config = {}
    OLMO3.write_own_keys(config, OLMo3ModelProvider(num_layers=2, rotary_base_local=300.0))
    bases = {kind: rope["rope_theta"] for kind, rope in config["rope_parameters"].items()}
    assert bases == {"full_attention": 500_000, "sliding_attention": 300.0}
