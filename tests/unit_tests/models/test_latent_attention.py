# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.deepseek_v2 import DeepSeekV2ModelProvider
from megatron.bridge.models.deepseek_v3 import DeepSeekV3ModelProvider
from megatron.bridge.models.latent_attention import latent_spec


def provider(kind=DeepSeekV3ModelProvider, **changes):
    return kind(num_layers=2, hidden_size=32, num_attention_heads=4, **changes)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("position_embedding_type", "yarn"),
        ("rope_scaling", True),
        ("seq_len_interpolation_factor", 2.0),
        ("rotary_percent", 0.5),
    ],
)
def test_positions_of_another_attention_are_refused(option, value):
    with pytest.raises(ValueError, match=f"model.{option}={value!r}: latent attention has rotary positions of its own"):
        provider(**{option: value}).finalize()


def test_routers():
    second, third = provider(DeepSeekV2ModelProvider), provider()
    assert (second.moe_router_score_function, second.moe_router_enable_expert_bias) == ("softmax", False)
    assert (third.moe_router_score_function, third.moe_router_enable_expert_bias) == ("sigmoid", True)
    assert second.multi_latent_attention and third.multi_latent_attention and third.moe_router_bias_update_rate == 0
    third.finalize()
    assert third.kv_channels == third.v_head_dim == 128


@pytest.mark.parametrize("spec", [None, ModuleSpec(module=object), TransformerBlockSubmodules()])
def test_a_spec_without_latent_attention_is_refused(spec):
    with pytest.raises(ValueError, match="without MLASelfAttention in every layer"):
        latent_spec(spec)
