# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Qwen3.5 family with experts, text: Qwen3-Next's layers, each with experts beside a shared one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.conversion.expert_stacks import ExpertStack
from megatron.bridge.models.decoder import HF_LAYER, expert_fields
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.models.qwen3_5 import HYBRID_MAPPINGS
from megatron.bridge.models.qwen3_next import (
    EXPERT_MAPPINGS,
    Qwen3NextModelProvider,
    delta_net_fields,
)


@dataclass
class Qwen35MoEModelProvider(Qwen3NextModelProvider):
    """What all Qwen3.5 with experts share."""

    num_moe_experts: int | None = 256
    moe_router_topk: int = 8


def _provider_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    width = hf["moe_intermediate_size"]
    return {
        **delta_net_fields({**hf, "intermediate_size": width}),
        **expert_fields(hf, ffn_hidden_size=width),
        "moe_shared_expert_intermediate_size": hf["shared_expert_intermediate_size"],
    }


_STACK = f"{HF_LAYER}mlp.experts."
_EXPERT = f"{_STACK}{{expert}}."

FAMILY = ModelFamily(
    provider_class=Qwen35MoEModelProvider,
    provider_fields=_provider_fields,
    mappings=(*HYBRID_MAPPINGS, *EXPERT_MAPPINGS),
    has_further_layers=True,
    # As published. transformers writes a new model's experts one by one.
    read_stacks=(
        ExpertStack(
            f"{_STACK}gate_up_proj",
            (f"{_EXPERT}gate_proj.weight", f"{_EXPERT}up_proj.weight"),
            part_after_part=True,
        ),
        ExpertStack(f"{_STACK}down_proj", (f"{_EXPERT}down_proj.weight",), part_after_part=True),
    ),
)
