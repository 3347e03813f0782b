# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Mixtral family: Mistral's attention, and in every layer experts of which each token takes two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.decoder import (
    NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    ExpertsModelProvider,
    attention_mappings,
    decoder_fields,
    expert_fields,
    expert_mappings,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class MixtralModelProvider(ExpertsModelProvider):
    """Mixtral 8x7B's defaults."""

    num_query_groups: int | None = 8
    seq_length: int = 32768
    rotary_base: float = 1_000_000
    layernorm_epsilon: float = 1e-5


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **decoder_fields(hf),
        **window_fields(hf),
        **expert_fields(hf, ffn_hidden_size=hf["intermediate_size"]),
    }


FAMILY = ModelFamily(
    provider_class=MixtralModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *VOCABULARY_MAPPINGS,
        *NORM_MAPPINGS,
        *attention_mappings("weight"),
        *expert_mappings("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
)
