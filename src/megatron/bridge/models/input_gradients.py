# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Let the output of a frozen embedding require gradients.

With recomputation, Core computes gradients of a layer's weights only if an input of the layer requires one. The output
of a frozen embedding doesn't, so no recomputed layer would be trained, silently. And if one expert-parallel rank trains
experts and another trains none, the latter skips the exchange of tokens in the backward pass, and the former hangs.
"""

from typing import Any, TypeGuard

import torch
from megatron.core.models.gpt import GPTModel


def enable_input_gradients(chunk: torch.nn.Module) -> None:
    """Let the embedding's output require gradients if a recomputed layer is trained, even if the embedding is frozen.

    Args:
        chunk: A bare chunk. Without an embedding, or without recomputation, nothing is changed.
    """
    if _has_embedding(chunk) and chunk.config.recompute_granularity is not None:
        # Decided in each forward pass, since weights may be frozen at any time before training.
        chunk.embedding.register_forward_hook(
            lambda _module, _inputs, output: _with_gradients_if_needed(chunk.decoder, output)
        )


def enable_input_gradients_always(chunk: torch.nn.Module) -> None:
    """Let the embedding's output require gradients in any case, because other ranks need this rank's backward pass.

    Args:
        chunk: A bare chunk. One without an embedding is not changed: the stage before it requires gradients.
    """
    if _has_embedding(chunk):
        chunk.embedding.register_forward_hook(lambda _module, _inputs, output: _requiring_gradients(output))


def _has_embedding(chunk: torch.nn.Module) -> TypeGuard[GPTModel]:
    return isinstance(chunk, GPTModel) and chunk.pre_process


def _with_gradients_if_needed(layers: torch.nn.Module, output: torch.Tensor) -> Any:
    """The embedding's output for a hook; None to leave it unchanged."""
    return _requiring_gradients(output) if any(param.requires_grad for param in layers.parameters()) else None


def _requiring_gradients(output: torch.Tensor) -> Any:
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    # A copy, because Core changes the output in place, which torch forbids for a leaf that requires gradients.
    return output.requires_grad_().clone()
