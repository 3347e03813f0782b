# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A model of one's own: a bridge and a provider registered from outside the package, then a round trip."""

import sys
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


class CamelConfig(LlamaConfig):
    model_type = "camel"


class CamelForCausalLM(LlamaForCausalLM):
    config_class = CamelConfig


@dataclass
class CamelModelProvider(GPTModelProvider):
    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    position_embedding_type: str = "rope"
    add_bias_linear: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    bias_activation_fusion: bool = True


@MegatronModelBridge.register_bridge(source=CamelForCausalLM, target=GPTModel)
class CamelBridge(MegatronModelBridge):
    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> CamelModelProvider:
        hf_config = hf_pretrained.config
        return CamelModelProvider(
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            ffn_hidden_size=hf_config.intermediate_size,
            num_attention_heads=hf_config.num_attention_heads,
            num_query_groups=hf_config.num_key_value_heads,
            activation_func=torch.nn.functional.silu,
            init_method_std=hf_config.initializer_range,
            layernorm_epsilon=hf_config.rms_norm_eps,
            rotary_base=10000,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by(hf_config.vocab_size),
            vocab_size=hf_config.vocab_size,
            seq_length=hf_config.max_position_embeddings,
            fp16=False,
            bf16=True,
            params_dtype=torch.bfloat16,
        )

    def mapping_registry(self) -> MegatronMappingRegistry:
        same_shape = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.layers.*.input_layernorm.weight",
            "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "model.layers.*.post_attention_layernorm.weight",
            "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
            "decoder.layers.*.mlp.linear_fc2.weight": "model.layers.*.mlp.down_proj.weight",
        }
        mappings = [AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in same_shape.items()]
        mappings.extend(
            [
                QKVMapping(
                    megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",
                    q="model.layers.*.self_attn.q_proj.weight",
                    k="model.layers.*.self_attn.k_proj.weight",
                    v="model.layers.*.self_attn.v_proj.weight",
                ),
                GatedMLPMapping(
                    megatron_param="decoder.layers.*.mlp.linear_fc1.weight",
                    gate="model.layers.*.mlp.gate_proj.weight",
                    up="model.layers.*.mlp.up_proj.weight",
                ),
            ]
        )
        return MegatronMappingRegistry(*mappings)


if __name__ == "__main__":
    hf_model, output = sys.argv[1:]
    assert "CamelForCausalLM" in AutoBridge.list_supported_models()
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    provider = bridge.to_megatron_provider()
    assert isinstance(provider, CamelModelProvider)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, output)
