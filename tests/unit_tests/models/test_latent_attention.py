# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.deepseek_v2 import DeepSeekV2ModelProvider
from megatron.bridge.models.deepseek_v3 import DeepSeekV3ModelProvider
from megatron.bridge.models.latent_attention import latent_spec
from megatron.bridge.models.layer_specs import local_layer_spec
from megatron.bridge.planning.world import planned_world


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


@pytest.mark.parametrize("latent", ["q", "kv"])
def test_a_norm_without_an_epsilon_is_refused(latent):
    """Its own would stay, and the model would be another one."""

    def without_norm(config, vp_stage=None):
        block = local_layer_spec(config, vp_stage)
        for layer in block.layer_specs:
            setattr(layer.submodules.self_attention.submodules, f"{latent}_layernorm", IdentityOp)
        return block

    sizes = {"ffn_hidden_size": 32, "num_moe_experts": None, "moe_router_enable_expert_bias": False, "vocab_size": 32}
    with planned_world(1):
        model = provider(**sizes, transformer_impl="local", transformer_layer_spec=without_norm)
        model.initialize_model_parallel(create_gloo_process_groups=False)
        with pytest.raises(ValueError, match=rf"none of {latent}_layernorm \(IdentityOp\) and linear_{latent}_up_proj"):
            model.provide_distributed_model(wrap_with_ddp=False)
        model.transformer_layer_spec = local_layer_spec
        (built,) = model.provide_distributed_model(wrap_with_ddp=False)
        attention = built.decoder.layers[0].self_attention
        assert getattr(attention, f"{latent}_layernorm").eps == model.latent_layernorm_epsilon
