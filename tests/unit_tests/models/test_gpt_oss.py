# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
import transformers

from megatron.bridge.models.families import provider_fields
from megatron.bridge.models.gpt_oss import GPTOSSModelProvider
from tests.rigs.families import MODELS
from tests.unit_tests.models.tiny_llama import SMALL


def hf_config(**changed):
    options = {**SMALL, **MODELS["gpt_oss"].options, **changed}
    return {**transformers.GptOssConfig(**options).to_dict(), "architectures": ["GptOssForCausalLM"]}


def test_the_published_file_gives_the_class_s_defaults():
    """Of what all sizes share, nothing differs."""
    published = {"quantization_config": {"quant_method": "mxfp4"}, "architectures": ["GptOssForCausalLM"]}
    config = transformers.GptOssConfig(eos_token_id=200002, pad_token_id=199999, rope_theta=150000).to_dict()
    fields = provider_fields({**config, **published})
    provider = GPTOSSModelProvider()
    of_size = {"num_layers", "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "num_attention_heads"}
    of_size |= {"num_moe_experts", "vocab_size", "window_size", "window_attn_skip_freq", "should_pad_vocab"}
    of_size |= {"params_dtype", "pipeline_dtype", "bf16", "make_vocab_size_divisible_by"}
    differing = {name for name, value in fields.items() if getattr(provider, name) != value}
    assert differing <= of_size, differing - of_size
    assert fields["window_size"] == (127, 0) and fields["window_attn_skip_freq"][:3] == [1, 0, 1]


def test_published_files_name_no_dtype_and_a_loss_that_they_switch_off():
    published = {key: value for key, value in hf_config(router_aux_loss_coef=0.9).items() if "dtype" not in key}
    published["quantization_config"] = {"quant_method": "mxfp4"}
    fields = provider_fields(published)
    assert fields["params_dtype"] is torch.bfloat16 and fields["bf16"]
    assert GPTOSSModelProvider(**fields).moe_aux_loss_coeff == 1e-3
    assert provider_fields({**published, "output_router_logits": True})["moe_aux_loss_coeff"] == 0.9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_bias": False}, "attention_bias=False is not supported"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8.* is not supported"),
    ],
)
def test_what_the_layers_cant_express_is_refused(changed, message):
    quantization = {"quantization_config": changed.pop("quantization_config", None)}
    with pytest.raises(ValueError, match=message):
        provider_fields({**hf_config(**changed), **quantization})


@pytest.mark.parametrize("sizes", [{"expert_tensor_parallel_size": 2}, {"expert_tensor_parallel_size": None}])
def test_ranks_that_share_an_expert_are_refused(sizes):
    provider = GPTOSSModelProvider(**provider_fields(hf_config()), tensor_model_parallel_size=2, **sizes)
    with pytest.raises(ValueError, match="model.expert_tensor_parallel_size=.* biases, .* set it to 1"):
        provider.finalize()
