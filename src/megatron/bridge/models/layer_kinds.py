# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which kind of layer stands where in a model, by its configuration: what estimates and counts need to know of it."""

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron.bridge.models.hybrid_layers import is_delta_net


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What sets a layer apart from the model's others."""

    is_moe: bool = False
    """Whether it has experts in place of the MLP."""
    is_delta_net: bool = False
    """Whether it has Gated DeltaNet in place of attention."""
    window: int | None = None
    """Tokens that a token attends to, itself included; None: all before it."""
    takes_keys: bool = False
    """Whether its keys and values are those of a layer before it."""


def kind_of_layer(config: TransformerConfig, layer_number: int) -> LayerKind:
    """The kind of a layer.

    Args:
        config: The provider.
        layer_number: From 1, over all pipeline stages.
    """
    slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    before = config.window_size[0] if slides and config.window_size else -1
    return LayerKind(
        is_moe=bool(config.num_moe_experts) and _is_in(config.moe_layer_freq, layer_number),
        is_delta_net=is_delta_net(config, layer_number),
        window=before + 1 if before >= 0 else None,
        takes_keys=config.takes_keys(layer_number),
    )


def kinds_of_layers(config: TransformerConfig) -> list[LayerKind]:
    """The kind of each layer, first to last."""
    return [kind_of_layer(config, number) for number in range(1, (config.num_layers or 0) + 1)]


def _is_in(pattern: Any, layer_number: int) -> bool:
    """Core's `moe_layer_freq`: every how many layers there are experts, or 0 or 1 for each layer."""
    if isinstance(pattern, int):
        return (layer_number - 1) % pattern == 0
    return bool(pattern[layer_number - 1])
