# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Mistral family: Mistral 7B, Nemo, and every other `MistralForCausalLM`. Some attend within a sliding window."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    IGNORED_TENSORS,
    DecoderModelProvider,
    decoder_fields,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class MistralModelProvider(DecoderModelProvider):
    """Mistral 7B's defaults."""

    num_query_groups: int | None = 8
    seq_length: int = 32768
    layernorm_epsilon: float = 1e-5


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    # transformers makes a Ministral of one that has layer_types.
    return {**decoder_fields(hf), **window_fields(hf, layer_types=hf.get("layer_types"))}


FAMILY = ModelFamily(
    provider_class=MistralModelProvider,
    provider_fields=_provider_fields,
    mappings=DECODER_MAPPINGS,
    ignored_tensors=IGNORED_TENSORS,
)
