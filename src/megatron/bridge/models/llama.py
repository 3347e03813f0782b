# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Llama family: Llama 1 to 3.x, SmolLM2, and every other `LlamaForCausalLM`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    IGNORED_TENSORS,
    DecoderModelProvider,
    attention_mappings,
    bias_fields,
    decoder_fields,
    mlp_mappings,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class LlamaModelProvider(DecoderModelProvider):
    """What all Llamas share."""


@dataclass
class Llama3ModelProvider(LlamaModelProvider):
    """Llama 3's defaults: grouped queries and a rotary base for long sequences."""

    num_query_groups: int | None = 8
    seq_length: int = 8192
    rotary_base: float = 500_000
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.01


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**decoder_fields(hf), **bias_fields(hf)}


FAMILY = ModelFamily(
    provider_class=LlamaModelProvider,
    provider_fields=_provider_fields,
    mappings=(*DECODER_MAPPINGS, *attention_mappings("bias"), *mlp_mappings("bias")),
    ignored_tensors=IGNORED_TENSORS,
)
