# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What Gemma 4's layers have of their own: heads of two sizes, values that are keys or another layer's, and a scale.

Shapes: S sequence, B batch, H hidden, D channels of a head.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import is_layer_window_attention

from megatron.bridge.models.sandwich_layers import NormThenAdd, RotaryOfEachKind
from megatron.bridge.models.shared_keys import sources


class NormThenAddAndScale(NormThenAdd):
    """As `NormThenAdd`; the sum is the layer's output, and is multiplied by the layer's scale [1], a buffer."""

    layer_scalar: torch.Tensor

    def __init__(self, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config=config, **options)
        self.register_buffer("layer_scalar", torch.ones(1, dtype=config.params_dtype))

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that adds, as in `NormThenAdd`."""
        norm_then_add = super().forward(training, fused)
        return lambda *arguments: norm_then_add(*arguments) * self.layer_scalar


class RotaryOfEachSize(RotaryOfEachKind):
    """Rotary positions of two kinds of layers whose heads differ in size."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The angles, [S * (D of full layers + D of sliding ones)]. Arguments as for `RotaryEmbedding`.

        One after the other, because Transformer Engine's fused rotation reads the memory of angles row by row, whatever
        their strides: a part of wider rows would give it other positions' angles.
        """
        return torch.cat([self.full(*args, **kwargs).flatten(), self.sliding(*args, **kwargs).flatten()])


class SelfAttentionOfItsSize(SelfAttention):
    """Attention with the heads of its kind of layer, whose values are normalised too.

    Args:
        config: The provider. Its `of_layer` gives each layer's fields.
        submodules: Core's.
        layer_number: From 1, over all pipeline stages.
        options: Core's.
    """

    def __init__(self, config: Any, submodules: Any, layer_number: int, *args: Any, **options: Any) -> None:
        sizes = config.of_layer(layer_number)
        missing = 2 - sizes.num_kv_projections
        if missing:
            rows = missing * sizes.kv_channels * sizes.num_query_groups
            submodules = replace(submodules, linear_qkv=_with_fewer_rows(submodules.linear_qkv, rows))
        if not sizes.num_kv_projections:
            submodules = replace(submodules, k_layernorm=IdentityOp)
        super().__init__(sizes, submodules, layer_number, *args, **options)
        self.is_source = layer_number in sources(config)
        self.keys_and_values: tuple[torch.Tensor, torch.Tensor] | None = None
        self.slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.channels_of_both = config.global_kv_channels + config.kv_channels

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Core's, with `rotary_pos_emb` as `RotaryOfEachSize` gives it."""
        angles = kwargs.get("rotary_pos_emb")
        if angles is not None:
            length, channels = angles.numel() // self.channels_of_both, self.hidden_size_per_attention_head
            own = angles[-length * channels :] if self.slides else angles[: length * channels]
            kwargs["rotary_pos_emb"] = own.view(length, 1, 1, channels)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Query [S, B, heads, D], key and value [S, B, groups, D] of this rank. Arguments as for Core's.

        Key and value are `keys_and_values` in a layer without its own, which it is given before. A layer whose keys and
        values others take puts them there.
        """
        assert self.q_layernorm is not None, "qk_layernorm, checked when finalized"
        if not self.config.num_kv_projections:
            query, _ = self.linear_qkv(hidden_states)
            assert self.keys_and_values is not None, "of LayerWithContext"
            return self.q_layernorm(
                query.unflatten(-1, (-1, self.hidden_size_per_attention_head))
            ), *self.keys_and_values
        if self.config.values_are_keys:
            query, value = self._query_and_key(hidden_states)
            assert self.k_layernorm is not None, "as q_layernorm"
            query, key = self.q_layernorm(query), self.k_layernorm(value)
        else:
            query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **options)
        normed = F.rms_norm(value.float(), value.shape[-1:], eps=self.config.layernorm_epsilon)
        value = normed.to(value.dtype)
        if self.is_source:
            self.keys_and_values = key, value
        return query, key, value

    def _query_and_key(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both before their norms. Where ranks share a group, each has a part of its rows: they are gathered."""
        mixed, _ = self.linear_qkv(hidden_states)
        groups, channels = self.config.num_query_groups, self.hidden_size_per_attention_head
        ranks_of_group, rank = max(self.world_size // groups, 1), self.pg_collection.tp.rank()
        if ranks_of_group > 1:
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed)
            mixed = mixed.chunk(groups, dim=-1)[rank // ranks_of_group]
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        query, key = mixed.split([mixed.shape[-1] - channels, channels], dim=-1)
        query = query.flatten(2).unflatten(-1, (-1, channels))
        if ranks_of_group > 1:
            query = query.chunk(ranks_of_group, dim=2)[rank % ranks_of_group]
        return query, key


def _with_fewer_rows(build: Callable[..., torch.nn.Module], rows: int) -> Callable[..., torch.nn.Module]:
    """A builder of a linear layer that leaves out so many of its output features."""

    def built(input_size: int, output_size: int, **options: Any) -> torch.nn.Module:
        return build(input_size, output_size - rows, **options)

    return built


def cap_logits(output_layer: torch.nn.Module, cap: float) -> None:
    """Bend the logits of Core's output layer by a hyperbolic tangent, so that none is beyond `cap`.

    What a hook that is there already does to the logits comes after.
    """

    def bend(_layer: torch.nn.Module, _inputs: Any, output: tuple) -> tuple:
        logits, bias = output
        return torch.tanh(logits / cap) * cap, bias

    output_layer.register_forward_hook(bend, prepend=True)
