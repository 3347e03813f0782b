# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Names of a model's modules and parameters that mean the same on every rank."""

import re
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

_EXPERT = re.compile(
    r"(?<=\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+|(?<=\.experts\.linear_fc[12]\.adapter\.)\d+"
)
"""The number of an expert among those of its rank, in Core's modules of one expert each, and of all of them."""


def name_over_all_ranks(chunk: Any, name: str) -> str:
    """A name with its layer counted over all pipeline stages, its expert over all expert-parallel ranks.

    Args:
        chunk: The bare chunk that the name was found in.
        name: Of a module or parameter.
    """
    layer = re.match(r"decoder\.layers\.(\d+)", name)
    if layer is None:
        return name
    number = chunk.decoder.layers[int(layer[1])].layer_number - 1
    return f"decoder.layers.{number}" + _EXPERT.sub(partial(_global_expert, chunk.config), name[layer.end() :])


def _global_expert(config: TransformerConfig, local: re.Match) -> str:
    if config.expert_model_parallel_size == 1:
        return local[0]
    on_each_rank = config.num_moe_experts // config.expert_model_parallel_size
    return str(on_each_rank * parallel_state.get_expert_model_parallel_rank() + int(local[0]))
