# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where gradients enter a model whose embedding is frozen.

Core's recomputation gives a layer's weights gradients only if one of the layer's inputs requires one. A frozen
embedding's output doesn't, and so nothing above it that is recomputed would be trained, without a word. And where an
expert-parallel rank trains experts and another none, the other skips the exchange of tokens in the backward pass, for
which the first waits.
"""

from typing import Any, TypeGuard

import torch
from megatron.core.models.gpt import GPTModel


def enable_input_gradients(chunk: torch.nn.Module) -> None:
    """Let the embedding's output require gradients wherever a recomputed layer is trained, whatever froze it.

    Args:
        chunk: A bare chunk. Without an embedding, or without recomputation, nothing is changed.
    """
    if _has_embedding(chunk) and chunk.config.recompute_granularity is not None:
        # Asked in each forward pass: weights may be frozen at any time before training.
        chunk.embedding.register_forward_hook(
            lambda _module, _inputs, output: _with_gradients_if_needed(chunk.decoder, output)
        )


def enable_input_gradients_always(chunk: torch.nn.Module) -> None:
    """Let the embedding's output require gradients, whatever this rank trains: others need its part of the backward.

    Args:
        chunk: A bare chunk. Without an embedding nothing is changed: gradients enter it from the stage before it.
    """
    if _has_embedding(chunk):
        chunk.embedding.register_forward_hook(lambda _module, _inputs, output: _requiring_gradients(output))


def _has_embedding(chunk: torch.nn.Module) -> TypeGuard[GPTModel]:
    return isinstance(chunk, GPTModel) and chunk.pre_process


def _with_gradients_if_needed(layers: torch.nn.Module, output: torch.Tensor) -> Any:
    """None, where the output stays as it is."""
    return _requiring_gradients(output) if any(param.requires_grad for param in layers.parameters()) else None


def _requiring_gradients(output: torch.Tensor) -> Any:
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    # A copy: what is a leaf must not be changed in place, and Core does so.
    return output.requires_grad_().clone()
