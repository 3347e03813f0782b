# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Layers of two kinds: Gated DeltaNet in some, attention with a gate at its output in the others.

They are made of the layers of a block spec, Core's local ones or Transformer Engine's.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.bridge.models.layer_specs import with_attention, with_each_layer


class GatedSelfAttention(SelfAttention):
    """Attention whose output is multiplied by a gate.

    With fewer query groups than tensor-parallel ranks, Core 0.16 gives each rank the gates of a whole group. Core also
    compiles the product, which takes longer than a short run.
    """

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The output [S, B, channels of this rank's heads], times its gates [S, B, heads, channels of a head]."""
        heads = self.config.num_attention_heads // self.pg_collection.tp.size()
        if gate.shape[2] > heads:
            first = self.pg_collection.tp.rank() % (gate.shape[2] // heads) * heads
            gate = gate[:, :, first : first + heads]
        return (x * gate.reshape(x.shape).float().sigmoid()).to(x.dtype)


class AttentionOfItsKind:
    """Builds a layer's attention, or the Gated DeltaNet in its place, as `linear_attention_freq` says."""

    def __new__(cls, config: TransformerConfig, layer_number: int, *, submodules: Any, **options: Any) -> Any:
        """Build it.

        Args:
            config: The model's configuration.
            layer_number: From 1, over all pipeline stages.
            submodules: Attention's, whose linear layers Gated DeltaNet has too.
            options: Core's, for either.
        """
        if is_delta_net(config, layer_number):
            options.pop("attn_mask_type", None)
            linear = GatedDeltaNetSubmodules(submodules.linear_qkv, submodules.linear_proj)
            return GatedDeltaNet(config, linear, layer_number, **options)
        return GatedSelfAttention(config, submodules, layer_number, **options)


def is_delta_net(config: TransformerConfig, layer_number: int) -> bool:
    """Whether a layer has Gated DeltaNet in place of attention."""
    pattern = config.linear_attention_freq
    if isinstance(pattern, int):
        return bool(layer_number % pattern)
    return bool(pattern and pattern[layer_number - 1])


def delta_net_spec(block: Any) -> TransformerBlockSubmodules:
    """The layers of a block with attention of each layer's kind.

    Args:
        block: The spec of Core's local layers, or of Transformer Engine's. It isn't changed.

    Raises:
        ValueError: A spec of another form, which says nothing of its linear layers.
    """
    return with_each_layer(block, partial(with_attention, module=AttentionOfItsKind))
