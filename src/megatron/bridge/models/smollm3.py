# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The SmolLM3 family: a Llama in which some layers have no rotary positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import DECODER_MAPPINGS, DecoderModelProvider, decoder_fields, window_fields
from megatron.bridge.models.families import ModelFamily


@dataclass
class SmolLM3ModelProvider(DecoderModelProvider):
    """What all SmolLM3 share."""

    share_embeddings_and_output_weights: bool = True
    num_query_groups: int | None = 4
    seq_length: int = 65536
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 5_000_000


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        expect_value(hf, key, False)
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    without = [int(not turns) for turns in hf["no_rope_layers"]]
    if len(without) < hf["num_hidden_layers"]:
        raise ValueError(
            f"config.json: no_rope_layers has {len(without)} numbers: expected one for each of the "
            f"{hf['num_hidden_layers']} layers"
        )
    without = without[: hf["num_hidden_layers"]]
    return {
        **decoder_fields(hf),
        **window_fields({**hf, "sliding_window": window}, layer_types=hf["layer_types"]),
        "no_rope_freq": without if any(without) else None,
    }


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """Which layers have rotary positions: 1 in the file, 0 in Core's pattern."""
    config["no_rope_layers"] = [1 - int(skips) for skips in trained.no_rope_freq or [0] * trained.num_layers]


FAMILY = ModelFamily(
    provider_class=SmolLM3ModelProvider,
    provider_fields=_provider_fields,
    mappings=DECODER_MAPPINGS,
    write_own_keys=_write_own_keys,
)
