# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Layers that take keys and values of a layer before them, and inputs of their own (Gemma 4's E2B and E4B).

What later layers need passes from layer to layer as one tensor, the "context" of Core's layers. Core's recomputation
hands it to the layers that it computes again, and its gradient back, so nothing is kept beside autograd's graph.

    [ inputs of the layers that are still to come | keys, values of one kind of layer | of the other kind ]

Keys are those before rotary positions, which each layer turns as its own.

Shapes: S sequence, or this rank's part of it with sequence parallelism, T the whole one, B batch, H hidden, D channels
of a head.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import is_layer_window_attention

from megatron.bridge.models.per_layer_inputs import AddLayerInput, PerLayerInputs
from megatron.bridge.utils.set_fields import writes_that_nobody_set


def source_of(config: Any, layer_number: int) -> int | None:
    """The layer whose keys and values a layer takes; None: it has its own.

    Args:
        config: The provider. Its last `num_kv_shared_layers` layers take those of the last layer of their kind before.
        layer_number: From 1, over all pipeline stages.

    Raises:
        ValueError: No layer of its kind is before them.
    """
    first = config.num_layers - config.num_kv_shared_layers + 1
    if layer_number < first:
        return None
    slides = _slides(config, layer_number)
    found = next((number for number in range(first - 1, 0, -1) if _slides(config, number) == slides), None)
    if found is None:
        raise ValueError(
            f"model.num_kv_shared_layers={config.num_kv_shared_layers} of model.num_layers={config.num_layers}: layer "
            f"{layer_number} {'has a' if slides else 'has no'} sliding window, as no layer before these has, whose "
            "keys and values it could take; set fewer"
        )
    return found


def sources(config: Any) -> list[int]:
    """The layers whose keys and values others take, first to last. Arguments and errors as for `source_of`."""
    found = {source_of(config, number) for number in range(1, config.num_layers + 1)}
    return sorted(number for number in found if number is not None)


def context_of(config: Any) -> Iterator[tuple[int, int]]:
    """What a forward pass keeps beside the layers' own, in (channels of inputs, channels of keys and values) of a rank.

    The inputs before their norm and after it; and at each source a copy of what is still to come, with what it gives.

    Args:
        config: The provider.
    """
    inputs = config.num_layers * config.hidden_size_per_layer_input
    yield 2 * inputs, 0
    keys = 0
    for number in sources(config):
        groups, channels = _channels(config.of_layer(number), config.tensor_model_parallel_size)
        keys += 2 * groups * channels
        yield inputs - number * config.hidden_size_per_layer_input, keys


def _slides(config: Any, layer_number: int) -> bool:
    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)


class LayerWithContext(TransformerLayer):
    """A layer that takes its own input, and what others gave, from the context; and whose output is scaled by a buffer.

    Args:
        config: The provider.
        submodules: Core's. The attention has `keys_and_values`: what it is given, or what it made.
        layer_number: From 1, on this pipeline stage: all layers are on one.
        norm: The class of norms.
        options: Core's.
    """

    layer_scalar: torch.Tensor

    def __init__(self, config: Any, submodules: Any, layer_number: int = 1, *, norm: Any, **options: Any) -> None:
        of_layer = copy.copy(config)
        with writes_that_nobody_set(of_layer):  # Core reads the MLP's width here
            of_layer.ffn_hidden_size = config.of_layer(layer_number).ffn_hidden_size
        super().__init__(of_layer, submodules, layer_number, **options)
        self.source, self.sources = source_of(config, layer_number), sources(config)
        ranks = self.pg_collection.tp.size()
        self.sequence_parts = ranks if config.sequence_parallel else 1
        self.channels_of_sources = [_channels(config.of_layer(number), ranks) for number in self.sources]
        self.input_channels = config.hidden_size_per_layer_input
        if self.input_channels:
            self.layer_input = AddLayerInput(config, norm)
        self.register_buffer("layer_scalar", torch.ones(1, dtype=config.params_dtype))

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, context: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output [S, B, H], and the context of the next layer.

        Args:
            hidden_states: [S, B, H].
            context: See the module; [its length].
            arguments: As for Core's.
            options: As for Core's.
        """
        tokens, batch = hidden_states.shape[:2]
        own, context = context.tensor_split([tokens * batch * self.input_channels])
        attention: Any = self.self_attention
        if self.source is not None:
            place = self.sources.index(self.source)
            attention.keys_and_values = self._taken(context, place, tokens * self.sequence_parts, batch)
        output, _ = super().forward(hidden_states, *arguments, context=None, **options)
        if self.layer_number in self.sources:
            context = torch.cat([context, *(part.flatten() for part in attention.keys_and_values)])
        attention.keys_and_values = None
        if self.input_channels:
            output = self.layer_input(output, own.view(tokens, batch, self.input_channels))
        return output * self.layer_scalar, context

    def _taken(self, context: torch.Tensor, place: int, tokens: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [T, B, groups of this rank, D] of one of the sources."""
        lengths = [tokens * batch * groups * channels for groups, channels in self.channels_of_sources]
        shape = tokens, batch, *self.channels_of_sources[place]
        start = context.numel() - 2 * sum(lengths[place:])
        key, value = context[start : start + 2 * lengths[place]].chunk(2)
        return key.view(shape), value.view(shape)


def _channels(sizes: TransformerConfig, ranks: int) -> tuple[int, int]:
    """Query groups on each rank, and the channels of a head."""
    assert sizes.num_query_groups and sizes.kv_channels, "derived when finalized"
    return max(sizes.num_query_groups // ranks, 1), sizes.kv_channels


class ModelWithContext(GPTModel):
    """A GPT whose layers are `LayerWithContext`. All are on one pipeline stage.

    Args:
        config: The provider.
        options: Core's, with the spec of a block as `transformer_layer_spec`.
    """

    def __init__(self, config: Any, transformer_layer_spec: Any, **options: Any) -> None:
        super().__init__(config, transformer_layer_spec, **options)
        if config.hidden_size_per_layer_input:
            self.per_layer_inputs = PerLayerInputs(config, transformer_layer_spec.layer_norm)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        decoder_input: torch.Tensor | None = None,
        *arguments: Any,
        extra_block_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As Core's. `decoder_input` [S, B, H] are other embeddings of the same tokens."""
        if decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        context = decoder_input.new_empty(0)
        if self.config.hidden_size_per_layer_input:
            context = self.per_layer_inputs(input_ids, decoder_input).flatten()
        extra = {**(extra_block_kwargs or {}), "context": context}
        return super().forward(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input,
            *arguments,
            extra_block_kwargs=extra,
            **options,
        )
