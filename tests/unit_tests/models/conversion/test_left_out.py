# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest

from megatron.bridge.models import Gemma4ModelProvider, GLM45ModelProvider
from megatron.bridge.models.conversion.left_out import config_of_export, may_be_ignored, say_what_is_left_out
from megatron.bridge.models.glm4_moe import FAMILY

MODEL = GLM45ModelProvider(
    num_layers=46,
    hidden_size=64,
    num_attention_heads=4,
    share_embeddings_and_output_weights=False,
    moe_shared_expert_intermediate_size=1408,
)
LAST, FURTHER = "model.layers.45.mlp.gate.weight", "model.layers.46.eh_proj.weight"


def test_layers_that_predict_further_tokens_are_named_once():
    line = say_what_is_left_out([LAST, FURTHER, "model.norm.weight"], MODEL, FAMILY)
    assert line.startswith("1 tensors of layers from model.layers.46 on")
    assert say_what_is_left_out([LAST, "model.norm.weight"], MODEL, FAMILY) is None
    assert say_what_is_left_out([LAST, "mtp.fc.weight", "mtp.norm.weight"], MODEL, FAMILY).startswith(
        "2 tensors of mtp"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (LAST, False),
        (FURTHER, True),
        ("mtp.fc.weight", True),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", False),
    ],
)
def test_may_be_ignored(name, expected):
    assert may_be_ignored(name, MODEL, FAMILY) is expected


def test_an_export_does_not_speak_of_them():
    content = {"num_nextn_predict_layers": 1, "num_hidden_layers": 46}
    assert config_of_export(content) == {"num_nextn_predict_layers": 0, "num_hidden_layers": 46}
    assert config_of_export({"mtp_num_hidden_layers": 1}) == {"mtp_num_hidden_layers": 0}
    assert config_of_export({"num_hidden_layers": 46}) == {"num_hidden_layers": 46}


def test_a_model_with_code_of_its_own_is_exported_as_one_that_needs_none():
    """Kimi-K2's configuration is DeepSeek-V3's under another name."""
    content = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "eps": 1}
    assert config_of_export(content) == {"model_type": "deepseek_v3", "eps": 1}


def test_keys_of_layers_that_take_anothers_are_left_out_and_named():
    """Published files of Gemma 4's E2B and E4B hold them."""
    model = Gemma4ModelProvider(num_layers=4, hidden_size=64, num_attention_heads=4, num_kv_shared_layers=2)
    taken = [f"model.layers.2.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    needed = ["model.layers.1.self_attn.k_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    assert [may_be_ignored(name, model, FAMILY) for name in (*taken, *needed)] == [True] * 3 + [False] * 2
    assert say_what_is_left_out([*needed, *taken], model, FAMILY).startswith("3 tensors of keys and values")
    assert say_what_is_left_out(needed, model, FAMILY) is None
