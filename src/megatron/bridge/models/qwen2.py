# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Qwen2 family: Qwen1.5, Qwen2 and Qwen2.5, with biases on query, key and value and on nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    IGNORED_TENSORS,
    DecoderModelProvider,
    attention_mappings,
    decoder_fields,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class Qwen2ModelProvider(DecoderModelProvider):
    """What Qwen2 and Qwen2.5 share."""

    add_qkv_bias: bool = True
    seq_length: int = 32768
    rotary_base: float = 1_000_000


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**decoder_fields(hf), **window_fields(hf, layer_types=hf["layer_types"])}


FAMILY = ModelFamily(
    provider_class=Qwen2ModelProvider,
    provider_fields=_provider_fields,
    mappings=(*DECODER_MAPPINGS, *attention_mappings("bias")),
    ignored_tensors=IGNORED_TENSORS,
)
