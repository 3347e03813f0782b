# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The bias that routers add to their scores when they choose experts: a buffer in FP32, which no gradient reaches.

It is a weight of the model all the same: it is converted, saved and exported. Core moves it after each step, by
`moe_router_bias_update_rate`, towards experts that got fewer tokens than the mean.
"""

from collections.abc import Sequence

from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

EXPERT_BIAS = "router.expert_bias"
"""What its name in a model ends with."""
_IN_FP32 = ("expert_bias", "local_tokens_per_expert")
"""A router's buffers that 16 bits would spoil: the bias, and the counts of tokens that move it."""


def in_16_bits(chunks: Sequence[MegatronModule], config: TransformerConfig) -> list[MegatronModule]:
    """The chunks in Core's wrapper for 16 bits, in which the buffers of routers stay in FP32."""
    kept = {
        (module, name): buffer
        for chunk in chunks
        for module in chunk.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in _IN_FP32
    }
    wrapped: list[MegatronModule] = [Float16Module(config, chunk) for chunk in chunks]
    for (module, name), buffer in kept.items():
        setattr(module, name, buffer)
    return wrapped
