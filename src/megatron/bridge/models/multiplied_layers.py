# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Multipliers of embeddings, of what attention and MLP give, and of logits, around a GPT of Core's.

Shapes: S sequence, B batch, H hidden, V vocabulary per tensor-parallel rank.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.layer_specs import with_each_layer


class MultiplyThenAdd(torch.nn.Module):
    """Multiplies what attention or MLP gives before it is added to the residual.

    Args:
        add: What adds it: Core's function of (training, fused) that returns one of (output and bias, residual,
            dropout).
        factor: What it is multiplied by, with its bias.
    """

    def __init__(self, *, add: Any, factor: float) -> None:
        super().__init__()
        self.add = build_module(add)
        self.factor = factor

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that adds: called with (output, bias) and residual, [S, B, H] each but for the bias [H]."""
        add = self.add(training, fused)

        def multiply_then_add(
            output_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            output, bias = output_and_bias
            return add(((output if bias is None else output + bias) * self.factor, None), residual, dropout)

        return multiply_then_add


def multiplied_spec(block: Any, factor: float) -> TransformerBlockSubmodules:
    """The layers of a block, what their attention and MLP give multiplied.

    Args:
        block: The spec of Core's local layers, or of Transformer Engine's. It isn't changed.
        factor: What it is multiplied by.

    Raises:
        ValueError: A spec of another form.
    """
    return with_each_layer(block, lambda layer: _multiplied(layer, factor))


def _multiplied(layer: ModuleSpec, factor: float) -> ModuleSpec:
    def multiply_then(add: Any) -> ModuleSpec:
        return ModuleSpec(module=MultiplyThenAdd, params={"add": add, "factor": factor})

    parts = layer.submodules
    parts = replace(parts, self_attn_bda=multiply_then(parts.self_attn_bda), mlp_bda=multiply_then(parts.mlp_bda))
    return replace(layer, submodules=parts)


def multiply_ends(model: GPTModel, *, embeddings: float, logits: float) -> None:
    """Multiply a model's embeddings, and divide its logits.

    Args:
        model: A bare chunk.
        embeddings: What the embedding's output is multiplied by.
        logits: What logits are divided by; those of the vocabulary's padding are left.
    """
    if model.pre_process and embeddings != 1:
        model.embedding.register_forward_hook(partial(_multiply, factor=embeddings))
    if model.post_process and logits != 1:  # before what masks the padding
        model.output_layer.register_forward_hook(partial(_divide, divisor=logits), prepend=True)


def _multiply(_module: Any, _inputs: Any, output: torch.Tensor, *, factor: float) -> torch.Tensor:
    return output * factor


def _divide(_module: Any, _inputs: Any, output: tuple[torch.Tensor, Any], *, divisor: float) -> Any:
    """Of Core's output layer: logits [S, B, V] and a bias."""
    logits, bias = output
    return logits / divisor, bias
