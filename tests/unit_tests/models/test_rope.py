# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

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
