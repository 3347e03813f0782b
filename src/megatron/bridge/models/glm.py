# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""GLM-4 without experts, as of 2024: pairs of neighbouring channels turn in half of each head, gate and up in one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.decoder import (
    NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    DecoderModelProvider,
    attention_mappings,
    decoder_fields,
    gate_up_in_one_mappings,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class GLMModelProvider(DecoderModelProvider):
    """What dense GLM-4 share."""

    add_qkv_bias: bool = True
    kv_channels: int | None = 128
    num_query_groups: int | None = 2
    seq_length: int = 131_072
    layernorm_epsilon: float = 1.5625e-07
    rotary_interleaved: bool = True
    rotary_percent: float = 0.5
    apply_rope_fusion: bool = False  # Transformer Engine's kernel for packed samples turns halves, not pairs


def glm_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dense GLM-4."""
    return {**decoder_fields(hf, partial_rotary=True), "add_qkv_bias": hf["attention_bias"]}


GLM_MAPPINGS = (
    *VOCABULARY_MAPPINGS,
    *attention_mappings("weight"),
    attention_mappings("bias")[0],  # the output has none
    *gate_up_in_one_mappings(),
)

FAMILY = ModelFamily(
    provider_class=GLMModelProvider,
    provider_fields=glm_fields,
    mappings=(*GLM_MAPPINGS, *NORM_MAPPINGS),
)
