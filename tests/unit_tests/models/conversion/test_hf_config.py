# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.hf_config import read_hf_config
from megatron.bridge.models.families import FAMILY_MODULES, REFUSED_ARCHITECTURES, family_of, provider_fields

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def provider_of(**overrides):
    return AutoBridge.from_hf_config({**SMOLLM2, **overrides}).to_megatron_provider(load_weights=False)


def test_every_field_has_its_place():
    provider = provider_of(max_position_embeddings=4096, initializer_range=0.03)
    assert provider.num_layers == 30
    assert (provider.hidden_size, provider.ffn_hidden_size) == (576, 1536)
    assert (provider.num_attention_heads, provider.num_query_groups, provider.kv_channels) == (9, 3, 64)
    assert (provider.vocab_size, provider.seq_length, provider.init_method_std) == (49152, 4096, 0.03)
    assert (provider.normalization, provider.layernorm_epsilon) == ("RMSNorm", 1e-5)
    assert (provider.position_embedding_type, provider.rotary_base) == ("rope", 100000.0)
    assert provider.share_embeddings_and_output_weights
    assert provider.gated_linear_unit and provider.activation_func is F.silu and not provider.add_bias_linear
    assert (provider.bf16, provider.fp16, provider.params_dtype) == (True, False, torch.bfloat16)


def test_old_files_leave_defaults_out():
    short = {key: value for key, value in SMOLLM2.items() if key not in ("num_key_value_heads", "torch_dtype")}
    provider = AutoBridge.from_hf_config(short).to_megatron_provider(load_weights=False)
    assert provider.num_query_groups == 9
    assert provider.params_dtype is torch.float32 and not provider.bf16


def test_transformers_objects_and_their_files_say_the_same(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_theta": 3e4, "rope_type": "default"}
    )
    config.save_pretrained(tmp_path)
    fields = [
        AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False),
        AutoBridge.from_hf_config(
            {**read_hf_config(tmp_path), "architectures": ["LlamaForCausalLM"]}
        ).to_megatron_provider(load_weights=False),
    ]
    assert fields[0] == fields[1]
    assert fields[0].rotary_base == 3e4


DENSE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def fields_of(family, **config):
    """A small configuration of a family in the provider's fields."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return provider_fields({"architectures": [f"{family}ForCausalLM"], **DENSE, **heads, **config})


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe"])
def test_both_spellings_of_rope_scaling(family):
    numbers = {**LLAMA3, "original_max_position_embeddings": 8192}
    old = fields_of(family, rope_theta=5e5, rope_scaling=numbers)
    assert old == fields_of(family, rope_parameters={**numbers, "rope_theta": 5e5})
    # transformers takes rope_scaling where both are there, and the base from beside it.
    assert old == fields_of(family, rope_theta=5e5, rope_scaling=numbers, rope_parameters={"rope_theta": 7.0})
    assert old["rope_scaling"] and old["rotary_base"] == 5e5 and old["rope_scaling_factor"] == 8.0
    plain = {"rope_theta": 3e4, "rope_type": "default"}
    linear = fields_of(family, rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=plain)
    assert linear["seq_len_interpolation_factor"] == 2.0
    for nothing in ({}, {"rope_scaling": None}):
        assert fields_of(family, rope_parameters=plain, **nothing)["rotary_base"] == 3e4
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    scaled = fields_of(family, rope_theta=5e5, rope_scaling={"type": "yarn", **yarn})
    assert scaled == fields_of(family, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **yarn})
    assert (scaled["position_embedding_type"], scaled["yarn_rotary_scaling_factor"]) == ("yarn", 4.0)
    dynamic = fields_of(family, rope_scaling={"rope_type": "dynamic", "factor": 4.0}, rope_parameters=plain)
    assert (dynamic["position_embedding_type"], dynamic["dynamic_rope_factor"]) == ("dynamic", 4.0)
    with pytest.raises(ValueError, match="rope_type='proportional' is not supported"):
        fields_of(family, rope_scaling={"rope_type": "proportional", "factor": 4.0}, rope_parameters=plain)


PLACES = {
    "rope_theta": "rotary_base",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "max_position_embeddings": "seq_length",
    "num_key_value_heads": "num_query_groups",
    "num_local_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "router_aux_loss_coef": "moe_aux_loss_coeff",
}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe"])
def test_an_absent_key_means_what_it_means_to_transformers(family):
    import transformers

    default = getattr(transformers, f"{family}Config")()
    sizes = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    given = {key: getattr(default, key) for key in sizes}
    fields = provider_fields({"architectures": [f"{family}ForCausalLM"], **given})
    assert fields["rotary_base"] == default.rope_parameters["rope_theta"]
    for key, name in PLACES.items():
        if hasattr(default, key) and key != "rope_theta":
            assert fields[name] == getattr(default, key), key
    heads = default.num_attention_heads
    assert fields["kv_channels"] == (getattr(default, "head_dim", None) or default.hidden_size // heads)
    window = default.sliding_window if family == "Mistral" else None
    assert fields.get("window_size") == (window and (window - 1, 0))


def test_reading_changes_nothing_in_what_is_read():
    config = {**SMOLLM2, "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = copy.deepcopy(config)
    AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    assert config == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True with mlp_bias=False is not supported"),
        ({"mlp_bias": True}, "attention_bias=False with mlp_bias=True is not supported"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type='proportional' is not supported: expected one of"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": -1.0}}, "factor .* is -1.0: expected more than 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor .*'4'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "factor .* is 0: expected more than 0"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 2.0}},
            "attention_factor=2.0 .* factor above 1 only",
        ),
        ({"torch_dtype": "float8_e4m3fn"}, "config.json: dtype='float8_e4m3fn' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*gptq.* is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, r"of their own for \['full_attention'\]"),
        ({"rope_theta": "1e4"}, "rope_theta of the rotary positions .* is '1e4': expected a number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json: .*factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 with rope_type='linear'",
        ),
        ({"num_hidden_layers": "30"}, "LlamaConfig refuses it .*'num_hidden_layers'"),
        ({"rms_norm_eps": "1e-5"}, "LlamaConfig refuses it .*'rms_norm_eps'"),
        ({"tie_word_embeddings": "false"}, "LlamaConfig refuses it .*'tie_word_embeddings'"),
        ({"hidden_size": 577}, "LlamaConfig refuses it .*577"),
        ({"model_type": "mistral"}, "model_type='mistral', and architectures names LlamaForCausalLM"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors' is not supported"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config=.* is not supported"),
    ],
)
def test_what_cannot_be_expressed_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message) as raised:
        provider_of(**overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("where", [{}, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}])
def test_partial_rotation_is_ignored_as_by_transformers(where, caplog):
    provider = provider_of(**(where or {"partial_rotary_factor": 0.5}))
    assert provider.rotary_percent == 1.0
    assert "partial_rotary_factor=0.5 is ignored" in caplog.text


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("Mistral", {"sliding_window": None}, {}),
        ("Mistral", {"sliding_window": 8}, {"window_size": (7, 0), "window_attn_skip_freq": None}),
        # AutoModel makes a Ministral of it, whose layers differ.
        (
            "Mistral",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            {"window_size": (7, 0), "window_attn_skip_freq": [1, 0]},
        ),
        ("Mistral", {"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}, {}),
        ("Mistral", {"sliding_window": 8, "layer_types": None}, {"window_size": (7, 0), "window_attn_skip_freq": None}),
        ("Mixtral", {}, {}),
        ("Mixtral", {"sliding_window": 8}, {"window_size": (7, 0), "window_attn_skip_freq": None}),
        ("Qwen2", {"sliding_window": 8}, {}),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True}, {}),  # from layer 28 on
        (
            "Qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
            {"window_size": (7, 0), "window_attn_skip_freq": None},
        ),
        (
            "Qwen3",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            {"window_size": (7, 0), "window_attn_skip_freq": [0, 1]},
        ),
        (
            "Qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            {"window_size": (7, 0), "window_attn_skip_freq": [1, 0]},
        ),
    ],
)
def test_window_of_each_spelling(family, config, expected):
    fields = fields_of(family, **config)
    found = {name: fields[name] for name in ("window_size", "window_attn_skip_freq") if name in fields}
    assert found == expected
    assert fields.get("masked_softmax_fusion", True) == (not expected)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("Qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "names sliding_attention, and there is no"),
        ("Mistral", {"sliding_window": 0}, "sliding_window=0: expected 1 or more"),
        ("Mistral", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types=.*chunked_attention"),
        ("Mistral", {"layer_types": ["full_attention"]}, "refuses it .*`layer_types` .1."),
        ("Mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with weights that add up to 1"),
        ("Qwen3Moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1 with weights"),
    ],
)
def test_windows_and_experts_that_cannot_be_are_refused(family, config, message):
    with pytest.raises(ValueError, match=message):
        fields_of(family, **{"sliding_window": 8, **config})


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe"])
def test_the_length_that_was_trained_on_may_stand_beside_the_rotary_settings(family):
    fields = fields_of(family, rope_theta=5e5, rope_scaling=LLAMA3, original_max_position_embeddings=4096)
    assert fields["rope_scaling_original_max_position_embeddings"] == 4096
    fields = fields_of(family, rope_theta=5e5, rope_scaling=LLAMA3, max_position_embeddings=2048)
    assert fields["rope_scaling_original_max_position_embeddings"] == 2048


def test_published_configurations_of_experts():
    """Qwen names the number of experts `num_experts`, and transformers 5 saves it as `num_local_experts`."""
    moe = {**SMOLLM2, "architectures": ["Qwen3MoeForCausalLM"], "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    for name in ("num_experts", "num_local_experts"):
        config = {**moe, name: 128, "norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 2}
        provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
        assert (provider.num_moe_experts, provider.moe_router_topk, provider.moe_ffn_hidden_size) == (128, 8, 768)
        assert provider.moe_layer_freq == [0, 1] * 15 and not provider.moe_router_pre_softmax
        assert provider.moe_aux_loss_coeff == 1e-3


def test_unknown_architecture_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match=r"\['BertModel'\]: supported are \['DeepseekV2ForCausalLM', ") as raised:
        AutoBridge.from_hf_config({"architectures": ["BertModel"]})
    assert "\n" not in str(raised.value) and str(AutoBridge.list_supported_models()) in str(raised.value)
    with pytest.raises(ValueError, match="has code of its own .auto_map., which is never run: supported are"):
        AutoBridge.from_hf_config({"architectures": ["BertModel"], "auto_map": {"AutoModel": "evil.T"}})
    assert not AutoBridge.supports({"architectures": ["BertModel"]})
    assert AutoBridge.supports(SMOLLM2)


@pytest.mark.parametrize("architecture", REFUSED_ARCHITECTURES)
def test_known_architectures_are_refused_with_the_reason(architecture):
    assert architecture not in FAMILY_MODULES
    with pytest.raises(ValueError, match=f"which needs {REFUSED_ARCHITECTURES[architecture]}: supported are"):
        AutoBridge.from_hf_config({"architectures": [architecture]})


@pytest.mark.parametrize("architecture", FAMILY_MODULES)
def test_every_family_has_a_file_of_its_own(architecture):
    family = family_of({"architectures": [architecture]})
    assert family.provider_class.__module__ == FAMILY_MODULES[architecture]
    with pytest.raises(ValueError, match=f"config.json lacks 'num_.*', which {architecture} needs"):
        provider_fields({"architectures": [architecture]})


def test_directories_without_a_model_are_refused(tmp_path, monkeypatch):
    assert not AutoBridge.can_handle(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        AutoBridge.from_hf_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        AutoBridge.from_hf_pretrained(tmp_path)


def test_no_weights_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="there are no weights to load"):
        AutoBridge.from_hf_config(SMOLLM2).to_megatron_provider()


def test_looking_at_models_and_help_import_no_torch():
    code = (
        "import sys; from megatron.bridge import AutoBridge; import megatron.bridge.convert as c; c.build_parser();"
        "assert AutoBridge.supports({'architectures': ['LlamaForCausalLM']});"
        "assert not {'torch', 'transformers', 'megatron.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
