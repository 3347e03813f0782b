# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run changed of its model stands in the exported `config.json`, or the export is refused."""

import pytest
import transformers

from megatron.bridge.models.conversion.hf_config import config_as_dict
from megatron.bridge.models.conversion.trained_config import (
    changed_in_training,
    check_base_is_as_trained,
    config_as_trained,
)
from megatron.bridge.models.conversion.transformers_config import config_class_of
from megatron.bridge.models.families import family_of, provider_fields
from tests.rigs.families import MODELS
from tests.unit_tests.models.tiny_llama import LLAMA3_ROPE, SMALL


def config_of(name):
    """The `config.json` of a tiny model, as transformers writes it."""
    architecture = MODELS[name].architecture
    config = getattr(transformers, architecture).config_class(**{**SMALL, **MODELS[name].options})
    return config_as_dict({**config.to_dict(), "architectures": [architecture]})


def provider_of(config, **changes):
    provider = family_of(config).provider_class(**provider_fields(config))
    for field, value in changes.items():
        setattr(provider, field, value)
    return provider


def old_form(config):
    """As before transformers 5, of families that were there."""
    if config["model_type"] == "gemma4_text":
        return config
    rope = dict(config.pop("rope_parameters"))
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    return {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_not_changed_keeps_its_file(name):
    config = config_of(name)
    provider = provider_of(config)
    provider.finalize()
    assert config_as_trained(config, provider) == config
    check_base_is_as_trained(config, provider, name)


LLAMA3 = {
    f"rope_scaling_{name}": value for name, value in LLAMA3_ROPE.items() if name not in ("rope_type", "rope_theta")
}
YARN = {"yarn_rotary_scaling_factor": 8.0, "yarn_original_max_position_embeddings": 16, "yarn_beta_fast": 16.0}
MSCALES = {"yarn_mscale": 0.9, "yarn_mscale_all_dim": 0.7, "yarn_correction_range_round_to_int": False}
LONGROPE = {
    "position_embedding_type": "longrope",
    "longrope_short_factor": [1.0, 1.1, 1.2, 1.3],
    "longrope_long_factor": [2.0, 3.0, 4.0, 5.0],
    "longrope_original_max_position_embeddings": 32,
    "longrope_attention_factor": 1.25,
}
CHANGES = {
    "rotary base": ("llama", {"rotary_base": 500_000}),
    "rotary base of scaled positions": ("llama3", {"rotary_base": 7_000.0}),
    "YaRN of latent attention": ("deepseek_v3", {"rotary_base": 7_000.0, "mscale": 1.5, "beta_fast": 16.0}),
    "YaRN of latent attention that leaves scores": (
        "deepseek_v2",
        {"rotary_scaling_factor": 8.0, "mscale_all_dim": 0.0},
    ),
    "part of a head that turns": ("glm4_moe", {"rotary_percent": 0.25}),
    "rotary base of a part": ("glm4_moe", {"rotary_base": 7_000.0, "moe_router_topk_scaling_factor": 2.0}),
    "linear scaling": ("llama", {"seq_len_interpolation_factor": 2.0}),
    "llama3's scaling": ("llama", {"rope_scaling": True, **LLAMA3}),
    "YaRN": ("llama", {"position_embedding_type": "yarn", **YARN}),
    "YaRN with mscales": ("llama", {"position_embedding_type": "yarn", **YARN, **MSCALES}),
    "YaRN with another factor of cosine and sine": (
        "llama",
        {"position_embedding_type": "yarn", **YARN, "yarn_mscale": 0.123, "yarn_mscale_all_dim": 0.0},
    ),
    "dynamic scaling": (
        "llama",
        {
            "position_embedding_type": "dynamic",
            "dynamic_rope_factor": 4.0,
            "dynamic_rope_max_position_embeddings": 64,
        },
    ),
    "another dynamic scaling": (
        "llama_dynamic",
        {"dynamic_rope_factor": 2.0, "dynamic_rope_max_position_embeddings": 99},
    ),
    "LongRoPE": ("llama", LONGROPE),
    "LongRoPE in place of llama3's": ("llama3", {"rope_scaling": False, **LONGROPE}),
    "another LongRoPE": ("phi3", {"longrope_long_factor": [2.0, 3.0, 4.0], "longrope_attention_factor": 1.5}),
    "length of LongRoPE": ("phi3", {"longrope_original_max_position_embeddings": 24, "rotary_base": 700.0}),
    "layers without rotary positions": ("smollm3", {"no_rope_freq": [0, 1, 0, 1]}),
    "rotary positions in all layers": ("smollm3", {"no_rope_freq": None}),
    "part of a head whose neighbouring channels turn": ("glm4", {"rotary_percent": 0.25}),
    "no LongRoPE": ("phi3", {"position_embedding_type": "rope"}),
    "YaRN in place of llama3's": ("llama3", {"rope_scaling": False, "position_embedding_type": "yarn", **YARN}),
    "no scaling": ("llama3", {"rope_scaling": False}),
    "a factor of the scaling": ("llama3", {"rope_scaling_factor": 2.0}),
    "epsilon": ("qwen2", {"layernorm_epsilon": 3e-4}),
    "experts of a token": ("mixtral", {"moe_router_topk": 3}),
    "experts of a token beside the MLP": ("gemma4_experts", {"moe_router_topk": 3}),
    "experts' weights": ("qwen3_moe", {"moe_router_pre_softmax": True, "moe_router_topk": 1}),
    "both rotary bases": ("gemma3_images", {"rotary_base": 500_000, "rotary_base_local": 77.0}),
    "cap and rotary base": ("gemma4", {"final_logit_softcapping": 5.0, "rotary_base": 77.0, "rotary_percent": 0.5}),
    "scale of the scores": ("gemma3", {"softmax_scale": 1 / 6}),
    "multipliers": ("granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}),
    "positions of a dense hybrid": ("granite4", {"position_embedding_type": "none", "softmax_scale": 0.3}),
    "positions of one without": ("granite4_nope", {"position_embedding_type": "rope", "rotary_base": 700.0}),
    "multiplier of scores": ("granite", {"softmax_scale": 0.3, "rotary_base": 700.0}),
    "rotary base and YaRN of full layers": ("olmo3", {"rotary_base": 700.0, "yarn_rotary_scaling_factor": 8.0}),
    "growth of queries": ("ministral3", {"llama_4_scaling_beta": 0.2}),
    "length from which queries grow": ("ministral3", {"yarn_original_max_position_embeddings": 16}),
    "rotary base of sliding layers": ("olmo3", {"rotary_base_local": 77.0}),
    "window": ("mistral", {"window_size": (4, 0)}),
    "no window": ("mistral", {"window_size": None, "window_attn_skip_freq": None}),
}


@pytest.mark.parametrize("form", [dict, old_form])
@pytest.mark.parametrize("case", CHANGES)
def test_what_was_changed_is_written(case, form, heard_records):
    name, changes = CHANGES[case]
    config = form(config_of(name))
    before, provider = dict(config), provider_of(config, **changes)
    written = config_as_trained(config, provider)
    assert config == before, "the model's own is left as it is"
    assert changed_in_training(written, provider) == {}
    assert changed_in_training(config, provider).keys() <= changes.keys()
    config_class_of(written["architectures"][0], written).from_dict(written)
    with pytest.raises(ValueError, match=rf"model\.({'|'.join(changes)})=.*export the whole model"):
        check_base_is_as_trained(config, provider, "the model")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rotary_percent": 0.5}),
        ("llama", {"normalization": "LayerNorm"}),
        ("llama", {"window_size": (7, 0)}),
        ("mixtral", {"moe_router_score_function": "sigmoid"}),
        ("qwen3", {"softmax_scale": 0.25}),
        ("gemma3", {"softmax_scale": 0.3}),
    ],
)
def test_what_the_file_has_no_key_for_is_refused(name, changes):
    config = config_of(name)
    with pytest.raises(ValueError, match=rf"model\.{next(iter(changes))}=.*can't say"):
        config_as_trained(config, provider_of(config, **changes))


def test_what_logits_dont_depend_on_may_differ():
    config = config_of("llama")
    provider = provider_of(
        config, seq_length=16, attention_dropout=0.1, init_method_std=1.0, recompute_granularity="full"
    )
    assert config_as_trained(config, provider) == config
