# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Qwen3.5 family, text: Qwen3-Next's layers with an MLP in each."""

from dataclasses import dataclass

from megatron.bridge.models.conversion.hybrid_mapping import delta_net_split_in_proj
from megatron.bridge.models.decoder import HF_LAYER, LAYER, mlp_mappings
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.qwen3_next import (
    DeltaNetModelProvider,
    delta_net_fields,
    hybrid_mappings,
)


@dataclass
class Qwen35ModelProvider(DeltaNetModelProvider):
    """What all dense Qwen3.5 share."""


_HF_LINEAR = f"{HF_LAYER}linear_attn."
HYBRID_MAPPINGS = hybrid_mappings(
    delta_net_split_in_proj(
        f"{LAYER}self_attention.in_proj.weight",
        qkv=f"{_HF_LINEAR}in_proj_qkv.weight",
        z=f"{_HF_LINEAR}in_proj_z.weight",
        b=f"{_HF_LINEAR}in_proj_b.weight",
        a=f"{_HF_LINEAR}in_proj_a.weight",
    )
)

FAMILY = ModelFamily(
    provider_class=Qwen35ModelProvider,
    provider_fields=delta_net_fields,
    mappings=(*HYBRID_MAPPINGS, *mlp_mappings("weight")),
    has_further_layers=True,
)
