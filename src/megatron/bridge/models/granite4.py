# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Granite 4's dense sizes: a Granite 3 in files of the hybrid family, with or without rotary positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.conversion.mapping import gate_up_in_one, split_columns
from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.decoder import HF_LAYER, LAYER, NORM_MAPPINGS, VOCABULARY_MAPPINGS, attention_mappings
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.granite import GraniteModelProvider, granite_fields, write_multipliers

_ATTENTION = ("attention", "full_attention")
"""How files, and transformers from version 5 on, name a layer with attention."""


@dataclass
class Granite4ModelProvider(GraniteModelProvider):
    """What Granite 4's dense sizes share."""


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    others = sorted(set(hf["layer_types"]).difference(_ATTENTION))
    if others:
        raise ValueError(
            f"config.json: layer_types names {', '.join(others)}, and Mamba layers are not supported for "
            f"{hf['architectures']}: expected attention in all layers, as in Granite 4's dense sizes"
        )
    if hf["num_local_experts"]:
        raise ValueError(
            f"config.json: num_local_experts={hf['num_local_experts']} is not supported for {hf['architectures']}: "
            "expected 0, as in Granite 4's dense sizes"
        )
    expect_value(hf, "attention_bias", False)
    fields = {**granite_fields(hf), "ffn_hidden_size": hf["shared_intermediate_size"]}
    # As transformers reads it: whatever else is there stands for none.
    return fields if hf["position_embedding_type"] == "rope" else {**fields, "position_embedding_type": "none"}


def _write_own_keys(config: dict[str, Any], trained: Any) -> None:
    """The multipliers, and whether there are rotary positions."""
    write_multipliers(config, trained)
    config["position_embedding_type"] = None if trained.position_embedding_type == "none" else "rope"


FAMILY = ModelFamily(
    provider_class=Granite4ModelProvider,
    provider_fields=_provider_fields,
    mappings=(
        *VOCABULARY_MAPPINGS,
        *NORM_MAPPINGS,
        *attention_mappings("weight"),
        gate_up_in_one(f"{LAYER}mlp.linear_fc1.weight", f"{HF_LAYER}shared_mlp.input_linear.weight"),
        split_columns(f"{LAYER}mlp.linear_fc2.weight", f"{HF_LAYER}shared_mlp.output_linear.weight"),
    ),
    write_own_keys=_write_own_keys,
)
