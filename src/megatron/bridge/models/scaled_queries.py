# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Queries that grow with their position beyond the length pretrained on, as in Llama 4 and Ministral 3.

Shapes: S sequence, B batch, D channels of a head that turn, L positions that have angles (S or more).
"""

from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.layer_specs import with_attention, with_each_layer
from megatron.bridge.models.rope_by_length import keep_position_ids


def query_scales(position_ids: torch.Tensor, *, beta: float, original_length: int) -> torch.Tensor:
    """What queries are multiplied by: 1 + beta * log(1 + floor(position / original_length)).

    Args:
        position_ids: Integers of any shape, on any device.
        beta: How fast scales grow.
        original_length: Length pretrained on, in tokens. Before it, scales are 1.

    Returns:
        float32, of the same shape and on the same device.
    """
    return 1 + beta * torch.log(1 + torch.floor(position_ids / original_length))


class RotaryWithScales(torch.nn.Module):
    """Rotary positions in place of a model's `rotary_pos_emb`, followed by the scales of the queries.

    They travel together, as an argument of each layer, so that a recomputed layer sees those of its own micro-batch.

    Args:
        plain: The model's own positions.
        beta: As for `query_scales`.
        original_length: As for `query_scales`.
    """

    def __init__(self, plain: RotaryEmbedding, *, beta: float, original_length: int) -> None:
        super().__init__()
        self.plain, self.beta, self.original_length = plain, beta, original_length
        self.position_ids: torch.Tensor | None = None
        self.get_rotary_seq_len = plain.get_rotary_seq_len

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The angles [L, 1, 1, D] where no position is scaled, else angles and scales one after the other [L*D + B*S].

        Arguments as for `RotaryEmbedding`.

        Raises:
            ValueError: The forward pass was given no position ids.
        """
        angles = self.plain(max_seq_len, *args, **kwargs)
        if max_seq_len <= self.original_length:
            return angles
        if self.position_ids is None:
            raise ValueError(
                f"the model was called with position_ids=None on rows of up to {max_seq_len} tokens: it scales queries "
                f"at positions from {self.original_length} on, and needs the position of each token in its sample"
            )
        scales = query_scales(self.position_ids, beta=self.beta, original_length=self.original_length)
        return torch.cat([angles.flatten(), scales.flatten()])


class SelfAttentionWithScaledQueries(SelfAttention):
    """Attention whose queries are multiplied by what `RotaryWithScales` hands it.

    Before the rotation, which keeps lengths; transformers multiplies after it.
    """

    _scales: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Core's, with `rotary_pos_emb` as `RotaryWithScales` gives it."""
        given = kwargs.get("rotary_pos_emb")
        if given is None or given.dim() > 1:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        length, batch = hidden_states.shape[:2]
        if self.config.sequence_parallel:
            length *= self.config.tensor_model_parallel_size
        channels = int(self.hidden_size_per_attention_head * self.config.rotary_percent)
        angles, scales = given[: -batch * length], given[-batch * length :]
        kwargs["rotary_pos_emb"] = angles.view(-1, 1, 1, channels)
        self._scales = scales.view(batch, length).t()[:, :, None, None]
        try:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        finally:
            self._scales = None

    def get_query_key_value_tensors(self, *args: Any, **options: Any) -> Any:
        """As Core's: query [S, B, heads, D], scaled, then key and value."""
        query, *others = super().get_query_key_value_tensors(*args, **options)
        return query if self._scales is None else query * self._scales.to(query.dtype), *others


def check_queries_can_be_scaled(config: Any) -> None:
    """Refuse what gives attention no scales, or queries only as a part of one tensor.

    Args:
        config: The provider.

    Raises:
        ValueError: It is set.
    """
    if config.position_embedding_type != "yarn":
        raise ValueError(
            f"model.position_embedding_type={config.position_embedding_type!r}: the family scales queries beyond "
            "model.yarn_original_max_position_embeddings; set it to 'yarn'"
        )
    for name in ("flash_decode", "fused_single_qkv_rope"):
        if getattr(config, name, False):
            raise ValueError(f"model.{name}=True: the family scales queries before the rotation; set it to False")


def scaled_queries_spec(block: Any) -> TransformerBlockSubmodules:
    """The layers of a block, with attention whose queries are scaled.

    Args:
        block: The spec of Core's local layers, or of Transformer Engine's. It isn't changed.

    Raises:
        ValueError: A spec of another form, or with another attention.
    """
    return with_each_layer(block, partial(with_attention, module=SelfAttentionWithScaledQueries))


def hand_scales_to_layers(model: Any, config: Any) -> None:
    """Give the layers of a model the scales of their queries.

    Args:
        model: A bare chunk of a `GPTModel` with rotary positions, of layers from `scaled_queries_spec`.
        config: The provider, with `llama_4_scaling_beta`.
    """
    positions = RotaryWithScales(
        model.rotary_pos_emb,
        beta=config.llama_4_scaling_beta,
        original_length=config.yarn_original_max_position_embeddings,
    )
    model.rotary_pos_emb = positions
    keep_position_ids(model, positions)
