# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Phi-3 family: Phi-3, Phi-3.5, Phi-4 and Phi-4-mini. Files have query, key and value in one tensor.

Those of long contexts have LongRoPE; in Phi-4-mini, three quarters of each head turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.conversion.mapping import qkv_in_one, split_columns
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    HF_LAYER,
    IGNORED_TENSORS,
    LAYER,
    NORM_MAPPINGS,
    VOCABULARY_MAPPINGS,
    DecoderModelProvider,
    decoder_fields,
    gate_up_in_one_mappings,
    window_fields,
)
from megatron.bridge.models.families import ModelFamily


@dataclass
class Phi3ModelProvider(DecoderModelProvider):
    """What all Phi-3 share."""

    seq_length: int = 4096
    layernorm_epsilon: float = 1e-5


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("resid_pdrop", "embd_pdrop"):  # Core has one dropout for embeddings and residuals
        expect_value(hf, key, 0)
    hides_nothing = (hf["sliding_window"] or 0) > hf["max_position_embeddings"]  # as Phi-4-mini's
    return {**decoder_fields(hf, partial_rotary=True), **({} if hides_nothing else window_fields(hf))}


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """The length pretrained on stands outside of `rope_parameters`, and goes before what stands there."""
    if trained.position_embedding_type == "longrope":
        config["original_max_position_embeddings"] = trained.longrope_original_max_position_embeddings


FAMILY = ModelFamily(
    provider_class=Phi3ModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *VOCABULARY_MAPPINGS,
        *NORM_MAPPINGS,
        qkv_in_one(f"{LAYER}self_attention.linear_qkv.weight", f"{HF_LAYER}self_attn.qkv_proj.weight"),
        split_columns(f"{LAYER}self_attention.linear_proj.weight", f"{HF_LAYER}self_attn.o_proj.weight"),
        *gate_up_in_one_mappings(),
    ),
    ignored_tensors=IGNORED_TENSORS,
    write_own_keys=_write_own_keys,
)
