# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""MXFP4, the 4-bit floats of the OCP microscaling formats: blocks of 32 numbers that share a power of two."""

import torch

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower 3 bits of a number say; the fourth is its sign."""
_BIAS = 127
"""Exponent 0 as a scale says it."""


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers of rows of blocks.

    Args:
        blocks: [rows, blocks, 16] uint8: two numbers a byte, the first in its lower half.
        scales: [rows, blocks] uint8: the exponent of each block.

    Returns:
        [rows, blocks * 32] bfloat16, which holds each of them exactly.
    """
    signed = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack([signed[byte & 15], signed[byte >> 4]], dim=1)
    numbers = pairs[blocks.int()].flatten(-2)
    scaled = torch.ldexp(numbers, scales.int()[..., None] - _BIAS)
    return scaled.flatten(-2).to(torch.bfloat16)
