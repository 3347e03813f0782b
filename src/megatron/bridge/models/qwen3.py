# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Qwen3 family: each head's query and key are normalised before the rotary positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    QK_NORM_MAPPINGS,
    DecoderModelProvider,
    decoder_fields,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class Qwen3ModelProvider(DecoderModelProvider):
    """What all dense Qwen3 share."""

    qk_layernorm: bool = True
    kv_channels: int | None = 128
    seq_length: int = 40960
    rotary_base: float = 1_000_000


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    expect_value(hf, "attention_bias", False)
    return {**decoder_fields(hf), **window_fields(hf, layer_types=hf["layer_types"])}


FAMILY = ModelFamily(
    provider_class=Qwen3ModelProvider,
    provider_fields=_provider_fields,
    mappings=(*DECODER_MAPPINGS, *QK_NORM_MAPPINGS),
)
