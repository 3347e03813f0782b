# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A plain GPT to pretrain: the architecture and size of GPT-2 small, 124,439,808 parameters.

Learned positions, LayerNorm, biases, GELU, tied embeddings: Core's defaults, for a first run or a baseline.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def vanilla_gpt_pretrain_config() -> "ConfigContainer":
    """A GPT of 12 layers from random weights, on Core's mock data until `dataset` names a blend of your own."""
    from megatron.bridge.models.conversion.hf_config import vocabulary_fields
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.recipes.common import pretrain_common

    model = GPTModelProvider(
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        vocab_size=50257,
        **vocabulary_fields(50257),
    )
    return pretrain_common(model, seq_length=1024)


RECIPES = {"vanilla_gpt_pretrain_config": vanilla_gpt_pretrain_config}
