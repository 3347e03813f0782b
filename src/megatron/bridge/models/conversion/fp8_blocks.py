# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Weights in FP8 with a scale for each block, as DeepSeek publishes them, or for each tensor: they are read as bf16.

A weight [R, C] in `float8_e4m3fn` stands beside its scales [R / b, C / b], rounded up, under the name of the weight and
`_scale_inv`. The value is the product of the two. With one scale for the whole, as Ministral 3 is published, there may
be another for the layer's inputs, `activation_scale`, which bf16 has no use for.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

SCALE = "_scale_inv"
"""What follows a weight's name in that of its scales."""
WHOLE_TENSOR = (sys.maxsize, sys.maxsize)
"""The block of weights that have one scale."""
_OF_INPUTS = ".activation_scale"


def block_size(quantization: Any) -> tuple[int, int] | None:
    """Rows and columns of a block; None for weights in another form than FP8 blocks.

    Args:
        quantization: `quantization_config` of a `config.json`.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    block: Any = quantization.get("weight_block_size", ())  # transformers' default without the key is another
    if block is None:
        return WHOLE_TENSOR
    is_right = isinstance(block, list) and len(block) == 2 and all(isinstance(one, int) and one > 0 for one in block)
    return (block[0], block[1]) if is_right else None


def without_scales(names: Iterable[str]) -> list[str]:
    """The names of tensors without those of scales that stand beside a weight."""
    known = dict.fromkeys(names)

    def is_scale(name: str) -> bool:
        if name.endswith(_OF_INPUTS):
            return f"{name.removesuffix(_OF_INPUTS)}.weight{SCALE}" in known
        return name.endswith(SCALE) and name.removesuffix(SCALE) in known

    return [name for name in known if not is_scale(name)]


def dequantized(weight: torch.Tensor, scales: torch.Tensor, *, block: tuple[int, int], name: str) -> torch.Tensor:
    """A weight in bf16.

    Args:
        weight: [R, C] in FP8, on the host, as the others.
        scales: [R / b, C / b], rounded up, of any floating-point dtype; for `WHOLE_TENSOR` one number of any shape.
        block: Rows and columns of a block.
        name: The weight's, for errors.

    Raises:
        ValueError: The shapes don't fit.
    """
    if block == WHOLE_TENSOR and scales.numel() == 1:
        return (weight.float() * scales.float().reshape(())).bfloat16()
    rows, columns = block
    expected = tuple(-(-length // of_block) for length, of_block in zip(weight.shape, block, strict=False))
    if weight.dim() != 2 or tuple(scales.shape) != expected:
        raise ValueError(
            f"{name + SCALE!r} has shape {tuple(scales.shape)} for a weight of {tuple(weight.shape)} in blocks of "
            f"{rows} x {columns}: expected {expected}; correct weight_block_size in config.json, or download the file "
            "again"
        )
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    for index, of_rows in enumerate(scales.float()):
        part = slice(index * rows, (index + 1) * rows)
        of_columns = of_rows.repeat_interleave(columns)[: weight.shape[1]]
        result[part] = weight[part].float() * of_columns
    return result
