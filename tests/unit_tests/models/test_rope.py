# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)

from megatron.bridge.models.families import provider_fields
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.rope import Llama3RopeScaling


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 64)])
def test_llama3_scaling_is_that_of_transformers(factor, original):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    numbers = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=original)
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers}
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / (5e5 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    scaled = Llama3RopeScaling(**numbers).scale(plain)
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)
    assert not torch.equal(scaled, plain)


YARN = {
    "plain": {"factor": 4.0},
    "of another length": {"factor": 40.0, "original_max_position_embeddings": 4096},
    "no factor": {"original_max_position_embeddings": 2048, "factor": None},
    "other turns": {"factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "not rounded, as in GPT-OSS": {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "mscales, as in DeepSeek": {"factor": 40.0, "mscale": 0.9, "mscale_all_dim": 0.7},
    "one mscale": {"factor": 40.0, "mscale": 0.7},
    "mscales of 0": {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0},
    "attention factor": {"factor": 8.0, "attention_factor": 0.8},
    "attention factor beside mscales": {"factor": 8.0, "attention_factor": 1.0, "mscale": 0.9, "mscale_all_dim": 0.7},
    "factor of 1": {"factor": 1.0},
    "steep": {"factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0},
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("case", YARN)
def test_yarn_is_that_of_transformers(case, theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": theta, "original_max_position_embeddings": 8192, **YARN[case]}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=32768, rope_parameters=dict(rope)
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    read = provider_fields({**config.to_dict(), "architectures": ["LlamaForCausalLM"], "rope_parameters": rope})
    provider = GPTModelProvider(**read)
    found = provider._yarn_scaling().frequencies(64, provider.rotary_base, torch.device("cpu"))
    assert torch.equal(found, expected)
    assert _yarn_get_concentration_factor_from_config(provider) == pytest.approx(attention_factor, rel=1e-12)
    assert provider._yarn_attention_factor() == _yarn_get_concentration_factor_from_config(provider)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "rope", "yarn_rotary_scaling_factor": 4.0}, "yarn_rotary_scaling_factor=4.0 with"),
        ({"position_embedding_type": "yarn", "seq_len_interpolation_factor": 2.0}, "seq_len_interpolation_factor=2.0"),
        ({"position_embedding_type": "yarn", "rope_scaling": True}, "rope_scaling=True"),
    ],
)
def test_two_scalings_are_refused(fields, message):
    provider = GPTModelProvider(num_layers=2, hidden_size=16, num_attention_heads=2, **fields)
    with pytest.raises(ValueError, match=message):
        provider.finalize()
