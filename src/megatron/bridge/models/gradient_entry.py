# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where gradients enter a model whose embedding is frozen and whose layers are recomputed.

Core's recomputation gives a layer's weights gradients only if one of the layer's inputs requires one. A frozen
embedding's output doesn't, and so nothing above it that is recomputed would be trained, without a word.
"""

from typing import Any

import torch


def open_gradient_entry(chunk: torch.nn.Module) -> None:
    """Let the embedding's output require gradients wherever a layer above it is trained, whatever froze the embedding.

    Args:
        chunk: A bare chunk. Without an embedding, or without recomputation, nothing is changed.
    """
    config = getattr(chunk, "config", None)
    if getattr(chunk, "pre_process", False) and getattr(config, "recompute_granularity", None) is not None:
        # Asked in each forward pass: weights may be frozen at any time before training.
        chunk.embedding.register_forward_hook(lambda _module, _inputs, output: _entry(chunk.decoder, output))


def _entry(layers: torch.nn.Module, output: torch.Tensor) -> Any:
    """None, where the output stays as it is."""
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    if not any(param.requires_grad for param in layers.parameters()):
        return None
    # A copy: what is a leaf must not be changed in place, and Core does so.
    return output.requires_grad_().clone()
