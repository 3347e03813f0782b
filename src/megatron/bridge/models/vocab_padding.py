# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows added to the vocabulary so that tensor-parallel ranks share it evenly, and what keeps them out of the loss.

Legend: S sequence, B batch, V vocabulary per tensor-parallel rank.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# exp(-1e4) is 0 in every dtype, and fp16 can hold it.
PADDING_LOGIT = -1e4


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """The smallest multiple of `divisible_by * tensor_model_parallel_size` that holds `vocab_size` tokens."""
    multiple = divisible_by * tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def largest_divisor(vocab_size: int, limit: int = 128) -> int:
    """The largest power of two up to `limit` that divides `vocab_size`: padding to it adds nothing at TP 1."""
    return math.gcd(vocab_size, limit)


def mask_padding_logits(
    output_layer: "torch.nn.Module", *, vocab_size: int, tensor_parallel_rank: int, tensor_parallel_size: int
) -> None:
    """Give the padding rows of an output layer no probability: the loss is then that of the unpadded vocabulary.

    Args:
        output_layer: Core's output layer; returns logits [S, B, V], or [S, B, V * TP] where it gathers, and a bias.
        vocab_size: Number of real tokens.
        tensor_parallel_rank: Which V rows of the vocabulary this rank holds.
        tensor_parallel_size: Number of ranks that share the vocabulary.
    """

    def fill(module: "torch.nn.Module", inputs: tuple, output: tuple) -> tuple:
        logits, bias = output
        width = logits.shape[-1]
        is_gathered = width == module.output_size and tensor_parallel_size > 1
        first_row = 0 if is_gathered else tensor_parallel_rank * width
        num_real = min(max(vocab_size - first_row, 0), width)
        if num_real < width:
            logits[..., num_real:] = PADDING_LOGIT
        return logits, bias

    output_layer.register_forward_hook(fill)
