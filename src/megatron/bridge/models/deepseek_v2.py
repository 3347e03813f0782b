# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The DeepSeek-V2 family: latent attention, shared experts, and experts chosen by a softmax over all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.bridge.models.biased_router import layered_expert_fields
from megatron.bridge.models.conversion.latent_fields import latent_fields
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import IGNORED_TENSORS, decoder_fields
from megatron.bridge.models.deepseek import DEEPSEEK_MAPPINGS, loss_fields
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.group_routing import group_fields
from megatron.bridge.models.latent_attention import MLAModelProvider


@dataclass
class DeepSeekV2ModelProvider(MLAModelProvider):
    """What all DeepSeek-V2 share."""

    moe_router_group_best: int = 1
    moe_router_pre_softmax: bool = True
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_enable_expert_bias: bool = False


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    for key, needed in (
        ("norm_topk_prob", False),  # transformers doesn't look at it
        ("mlp_bias", False),
        ("scoring_func", "softmax"),
        ("moe_layer_freq", 1),
    ):
        expect_value(hf, key, needed)
    if hf["topk_method"] != "greedy":
        expect_value(hf, "topk_method", "group_limited_greedy")
    fields = {**latent_fields(hf, decoder_fields(hf)), **layered_expert_fields(hf), **loss_fields(hf)}
    if fields["num_moe_experts"] is not None and hf["topk_method"] == "group_limited_greedy":
        fields |= group_fields(hf)
    return fields


FAMILY = ModelFamily(
    provider_class=DeepSeekV2ModelProvider,
    provider_fields=_provider_fields,
    mappings=DEEPSEEK_MAPPINGS,
    ignored_tensors=IGNORED_TENSORS,
)
