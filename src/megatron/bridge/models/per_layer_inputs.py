# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Inputs that each layer has of its own, made from the tokens and from their embeddings (Gemma 4's E2B and E4B).

Shapes: S sequence, or this rank's part of it with sequence parallelism, B batch, H hidden, L layers, P channels of a
layer's input.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module


class WholeLinear(torch.nn.Linear):
    """A linear layer without bias that each tensor-parallel rank holds whole.

    With sequence parallelism each rank's gradient is that of its part of the sequence, and Core adds up those of
    weights that are marked so.
    """

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
        if config.perform_initialization:
            assert config.init_method is not None, "derived when finalized"
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PerLayerInputs(MegatronModule):
    """The inputs of all layers: a table of the tokens' own, beside what is projected from their embeddings.

    Args:
        config: A finalized provider with `hidden_size_per_layer_input`.
        norm: The class of the norm of what is projected.
    """

    def __init__(self, config: Any, norm: Any) -> None:
        super().__init__(config=config)
        self.channels = config.hidden_size_per_layer_input
        width = config.num_layers * self.channels
        self.table = VocabParallelEmbedding(
            config.padded_vocab_size(),
            width,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        self.projection = WholeLinear(config.hidden_size, width, config)
        self.norm = build_module(norm, config=config, hidden_size=self.channels, eps=config.layernorm_epsilon)

    def forward(self, input_ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """The inputs [L, S, B, P].

        Args:
            input_ids: [B, whole sequence].
            embeddings: [S, B, H], as the first layer gets them.
        """
        of_tokens = self.table(input_ids)
        if not self.table.reduce_scatter_embeddings:
            of_tokens = of_tokens.transpose(0, 1)
        factor = torch.tensor(self.channels**0.5, dtype=of_tokens.dtype)  # rounded as in transformers
        of_tokens = (of_tokens * float(factor)).unflatten(-1, (-1, self.channels))
        projected = self.projection(embeddings) * self.config.hidden_size**-0.5
        normed = self.norm(projected.unflatten(-1, (-1, self.channels)))
        return ((normed + of_tokens) * 2**-0.5).movedim(2, 0).contiguous()


class AddLayerInput(torch.nn.Module):
    """Adds a layer's own input to its output, gated by that output, projected and normalised.

    Args:
        config: As for `PerLayerInputs`.
        norm: The norm's class.
    """

    def __init__(self, config: Any, norm: Any) -> None:
        super().__init__()
        channels = config.hidden_size_per_layer_input
        self.activation = config.activation_func
        self.gate = WholeLinear(config.hidden_size, channels, config)
        self.projection = WholeLinear(channels, config.hidden_size, config)
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """The sum [S, B, H] of a layer's output [S, B, H] and what its input [S, B, P] gives."""
        return output + self.norm(self.projection(self.activation(self.gate(output)) * layer_input))
