# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Granite family without experts: a Llama with multipliers of embeddings, residuals, scores and logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron.bridge.models.decoder import (
    DECODER_MAPPINGS,
    DecoderModelProvider,
    attention_mappings,
    bias_fields,
    decoder_fields,
    mlp_mappings,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gpt_provider import LayerSpec
from megatron.bridge.models.multiplied_layers import multiplied_spec, multiply_ends


@dataclass
class GraniteModelProvider(DecoderModelProvider):
    """What dense Granite share."""

    share_embeddings_and_output_weights: bool = True
    num_query_groups: int | None = 8
    seq_length: int = 131_072
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10_000_000
    embedding_multiplier: float = 12.0
    """What embeddings are multiplied by."""
    residual_multiplier: float = 0.22
    """What attention and MLP give is multiplied by before it is added to the residual."""
    logits_scaling: float = 16.0
    """What logits are divided by."""

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        multiply_ends(model, embeddings=self.embedding_multiplier, logits=self.logits_scaling)
        return model

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        return multiplied_spec(super()._layer_spec(vp_stage), self.residual_multiplier)


_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def granite_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that dense Granite share."""
    fields = {**decoder_fields(hf), **{name: float(hf[name]) for name in _MULTIPLIERS}}
    return {**fields, "softmax_scale": float(hf["attention_multiplier"])}


def write_multipliers(config: dict[str, Any], trained: Any) -> None:
    """The multipliers."""
    config |= {name: getattr(trained, name) for name in _MULTIPLIERS}
    if trained.softmax_scale:
        config["attention_multiplier"] = trained.softmax_scale


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**granite_fields(hf), **bias_fields(hf)}


FAMILY = ModelFamily(
    provider_class=GraniteModelProvider,
    provider_fields=_provider_fields,
    mappings=(*DECODER_MAPPINGS, *attention_mappings("bias"), *mlp_mappings("bias")),
    write_own_keys=write_multipliers,
)
