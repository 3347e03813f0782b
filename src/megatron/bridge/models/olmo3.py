# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The OLMo 3 family: an OLMo 2 with a window in three of four layers, and with YaRN in the others alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention

from megatron.bridge.models.conversion.rope_fields import rope_of_each_kind
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import decoder_fields, window_fields
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.olmo2 import OLMO_MAPPINGS, OLMo2ModelProvider
from megatron.bridge.models.post_norm_layers import NormedAttentionOfItsKind
from megatron.bridge.models.sandwich_layers import check_positions_of_each_kind, give_each_kind_its_positions


@dataclass
class OLMo3ModelProvider(OLMo2ModelProvider):
    """What all OLMo 3 share."""

    attention_class: ClassVar[type[SelfAttention]] = NormedAttentionOfItsKind
    seq_length: int = 65536
    masked_softmax_fusion: bool = False  # Core's fused kernel knows no window
    rotary_base_local: float = 500_000
    """Base of the rotary frequencies in layers with a sliding window; `rotary_base` is that of the others."""

    def finalize(self) -> None:
        """As for every provider.

        Raises:
            ValueError: Also for positions that have no base for each kind of layer.
        """
        check_positions_of_each_kind(self, ["rope", "yarn"])
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one bare chunk. See `GPTModelProvider.provide`."""
        model = super().provide(pre_process, post_process, vp_stage)
        give_each_kind_its_positions(model, self)
        return model


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    expect_value(hf, "attention_bias", False)
    of_full_layers, local_base = rope_of_each_kind(hf)
    return {
        **decoder_fields(of_full_layers),
        **window_fields(hf, layer_types=hf["layer_types"]),
        "rotary_base_local": local_base,
    }


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """The rotary positions of each kind of layer."""
    rope = config.get("rope_parameters")
    if rope is None and trained.rotary_base_local == OLMo3ModelProvider.rotary_base_local:
        return  # the form before transformers 5, which has a base for full layers alone
    if rope is None:
        rope = {
            "rope_theta": config.pop("rope_theta", trained.rotary_base),
            **(config.pop("rope_scaling", None) or {"rope_type": "default"}),
        }
    config["rope_parameters"] = {
        "full_attention": rope.get("full_attention", rope),
        "sliding_attention": {"rope_type": "default", "rope_theta": trained.rotary_base_local},
    }


FAMILY = ModelFamily(
    provider_class=OLMo3ModelProvider,
    provider_fields=_provider_fields,
    mappings=OLMO_MAPPINGS,
    write_own_keys=_write_own_keys,
)
