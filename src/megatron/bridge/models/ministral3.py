# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Ministral 3 family, text: a Mistral with YaRN, whose queries grow beyond the length pretrained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron.bridge.models.conversion.rope_fields import rope_number
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import DECODER_MAPPINGS, DecoderModelProvider, decoder_fields, window_fields
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.gpt_provider import LayerSpec, PositionEmbeddingType
from megatron.bridge.models.scaled_queries import (
    check_queries_can_be_scaled,
    hand_scales_to_layers,
    scaled_queries_spec,
)


@dataclass
class Ministral3ModelProvider(DecoderModelProvider):
    """What all Ministral 3 share."""

    num_query_groups: int | None = 8
    kv_channels: int | None = 128
    seq_length: int = 262_144
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 1_000_000
    position_embedding_type: PositionEmbeddingType = "yarn"
    yarn_rotary_scaling_factor: float = 16.0
    yarn_original_max_position_embeddings: int = 16384
    yarn_mscale: float | None = 1.0
    yarn_mscale_all_dim: float | None = 1.0
    llama_4_scaling_beta: float = 0.1
    """How fast queries grow at positions from `yarn_original_max_position_embeddings` on."""

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for what queries can't be scaled with.
        """
        check_queries_can_be_scaled(self)
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        hand_scales_to_layers(model, self)
        return model

    def _layer_spec(self, vp_stage: int | None) -> LayerSpec:
        return scaled_queries_spec(super()._layer_spec(vp_stage))


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    rope = hf["rope_parameters"]
    expect_value({**rope, "architectures": hf["architectures"]}, "rope_type", "yarn")
    return {
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        **decoder_fields(hf),
        **window_fields(hf),
        "llama_4_scaling_beta": rope_number(rope, "llama_4_scaling_beta"),
    }


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """How fast queries grow, in the form that the file has."""
    rope = config["rope_parameters" if "rope_parameters" in config else "rope_scaling"]
    rope["llama_4_scaling_beta"] = trained.llama_4_scaling_beta


FAMILY = ModelFamily(
    provider_class=Ministral3ModelProvider,
    provider_fields=_provider_fields,
    mappings=DECODER_MAPPINGS,
    write_own_keys=_write_own_keys,
)
