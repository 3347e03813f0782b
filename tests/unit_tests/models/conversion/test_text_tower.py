# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The language model out of a model that takes images too."""

import json

import pytest
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.hf_config import config_as_dict, read_hf_config
from megatron.bridge.models.conversion.text_tower import text_names
from megatron.bridge.peft.lora import LoRA

PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
"""Gemma 3 4B's, which leaves out what transformers' class says by default."""


def test_what_a_published_file_leaves_out_is_that_of_the_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = read_hf_config(tmp_path)
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["model_type"] == "gemma3_text"
    assert config["eos_token_id"] == [1, 106] and config["torch_dtype"] == "bfloat16" and "vision_config" not in config
    provider = AutoBridge.from_hf_config(PUBLISHED).to_megatron_provider(load_weights=False)
    sizes = (provider.num_attention_heads, provider.num_query_groups, provider.kv_channels, provider.vocab_size)
    assert sizes == (8, 4, 256, 262_208) and provider.seq_len_interpolation_factor == 8.0
    assert (provider.rotary_base, provider.rotary_base_local, provider.window_size) == (1e6, 1e4, (1023, 0))
    assert provider.window_attn_skip_freq[:7] == [1, 1, 1, 1, 1, 0, 1] and provider.bf16
    bridge = AutoBridge.from_hf_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is that of a Gemma3ForConditionalGeneration.*adapters merged"):
        bridge.save_hf_adapter([], tmp_path / "adapters", LoRA())


def test_configurations_of_transformers():
    """An object doesn't name its architecture; the class does."""
    assert AutoBridge.supports(PUBLISHED)
    for config in (transformers.Gemma3Config(), transformers.Gemma3TextConfig()):
        assert config_as_dict(config)["architectures"] == ["Gemma3ForCausalLM"]
    with pytest.raises(ValueError, match="text_config=None: expected the fields of its language model"):
        AutoBridge.supports({**PUBLISHED, "text_config": None})


@pytest.mark.parametrize(
    ("within", "architecture"),
    [({"model_type": "ministral3"}, "Ministral3ForCausalLM"), ({"model_type": "mistral"}, "MistralForCausalLM")]
    + [({}, "MistralForCausalLM")],
)
def test_the_language_model_within_is_that_of_its_type(within, architecture):
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": within}
    found = config_as_dict(config)
    assert found["architectures"] == [architecture] and AutoBridge.supports(config)
    assert found["model_type"] == architecture.removesuffix("ForCausalLM").lower()
    with pytest.raises(
        ValueError, match=r"text_config\.model_type='mistral4' is not supported: expected .* ministral3"
    ):
        config_as_dict({**config, "text_config": {"model_type": "mistral4"}})


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_names_in_files_of_each_age(prefix):
    stored = [f"{prefix}norm.weight", "language_model.lm_head.weight", "vision_tower.weight", "model.vision_tower.bias"]
    assert text_names(stored) == {"model.norm.weight": stored[0], "lm_head.weight": stored[1]}
    assert text_names(["model.norm.weight"]) == {"model.norm.weight": "model.norm.weight"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}, "full_attention": {}}},
            "rope_type='linear' of sliding_attention is not supported",
        ),
    ],
)
def test_what_the_layers_cannot_express_is_refused(text, message):
    config = {**PUBLISHED, "text_config": {**PUBLISHED["text_config"], "rope_scaling": None, **text}}
    with pytest.raises(ValueError, match=message):
        AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
