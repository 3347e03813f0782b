# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The OLMo 2 family: norms after attention and MLP alone, queries and keys normalised over all heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.transformer.attention import SelfAttention

from megatron.bridge.models.conversion.mapping import replicated, split_rows
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import (
    FINAL_NORM_MAPPING,
    HF_LAYER,
    LAYER,
    VOCABULARY_MAPPINGS,
    DecoderModelProvider,
    attention_mappings,
    decoder_fields,
    mlp_mappings,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gpt_provider import LayerSpec
from megatron.bridge.models.post_norm_layers import NormedAttention, check_projections_can_be_normed, post_norm_spec


@dataclass
class OLMo2ModelProvider(DecoderModelProvider):
    """What all OLMo 2 share."""

    attention_class: ClassVar[type[SelfAttention]] = NormedAttention
    seq_length: int = 4096
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 500_000

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for ranks that would hold the same keys.
        """
        check_projections_can_be_normed(self)
        super().finalize()

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        return post_norm_spec(super()._layer_spec(vp_stage), self, attention=self.attention_class)


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    expect_value(hf, "attention_bias", False)
    return decoder_fields(hf)


OLMO_MAPPINGS = (
    *VOCABULARY_MAPPINGS,
    *attention_mappings("weight"),
    *mlp_mappings("weight"),
    split_rows(f"{LAYER}self_attention.q_norm.weight", f"{HF_LAYER}self_attn.q_norm.weight"),
    split_rows(f"{LAYER}self_attention.k_norm.weight", f"{HF_LAYER}self_attn.k_norm.weight"),
    replicated(f"{LAYER}self_attn_bda.norm.weight", f"{HF_LAYER}post_attention_layernorm.weight"),
    replicated(f"{LAYER}mlp_bda.norm.weight", f"{HF_LAYER}post_feedforward_layernorm.weight"),
    FINAL_NORM_MAPPING,
)

FAMILY = ModelFamily(provider_class=OLMo2ModelProvider, provider_fields=_provider_fields, mappings=OLMO_MAPPINGS)
