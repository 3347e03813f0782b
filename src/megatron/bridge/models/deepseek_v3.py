# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The DeepSeek-V3 family, with Moonlight and Kimi-K2: latent attention, shared experts, and biased sigmoid routers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.biased_router import EXPERT_BIAS_MAPPING, biased_router_fields
from megatron.bridge.models.conversion.latent_fields import latent_fields
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import IGNORED_TENSORS, decoder_fields
from megatron.bridge.models.deepseek import DEEPSEEK_MAPPINGS, loss_fields
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.latent_attention import MLAModelProvider


@dataclass
class DeepSeekV3ModelProvider(MLAModelProvider):
    """What all DeepSeek-V3 share, and Moonlight and Kimi-K2."""


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    for key, needed in (
        ("rope_interleave", True),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
    ):
        expect_value(hf, key, needed)
    return {**latent_fields(hf, decoder_fields(hf)), **biased_router_fields(hf), **loss_fields(hf)}


FAMILY = ModelFamily(
    provider_class=DeepSeekV3ModelProvider,
    provider_fields=_provider_fields,
    mappings=(*DEEPSEEK_MAPPINGS, EXPERT_BIAS_MAPPING),
    ignored_tensors=IGNORED_TENSORS,
    has_further_layers=True,
)
