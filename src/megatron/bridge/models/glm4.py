# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""GLM-4 without experts, as of 2025 (GLM-4-0414, GLM-Z1): norms around attention and MLP."""

from dataclasses import dataclass

from megatron.core.transformer.attention import SelfAttention

from megatron.bridge.models.conversion.mapping import replicated
from megatron.bridge.models.decoder import HF_LAYER, LAYER, NORM_MAPPINGS
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.glm import GLM_MAPPINGS, GLMModelProvider, glm_fields
from megatron.bridge.models.gpt_provider import LayerSpec
from megatron.bridge.models.sandwich_layers import sandwich_spec


@dataclass
class GLM4ModelProvider(GLMModelProvider):
    """What GLM-4-0414 share."""

    seq_length: int = 32768
    layernorm_epsilon: float = 1e-5

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        return sandwich_spec(super()._layer_spec(vp_stage), self, attention=SelfAttention)


FAMILY = ModelFamily(
    provider_class=GLM4ModelProvider,
    provider_fields=glm_fields,
    mappings=(
        *GLM_MAPPINGS,
        *NORM_MAPPINGS,
        replicated(f"{LAYER}self_attn_bda.norm.weight", f"{HF_LAYER}post_self_attn_layernorm.weight"),
        replicated(f"{LAYER}mlp_bda.norm.weight", f"{HF_LAYER}post_mlp_layernorm.weight"),
    ),
)
