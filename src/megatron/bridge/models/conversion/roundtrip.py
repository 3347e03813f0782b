# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Proof that a conversion loses nothing: what a model exports, compared with the files it was loaded from."""

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule

from megatron.bridge.models.conversion.export import export_weights
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.families import ModelFamily


def compare_with_files(
    chunks: Sequence[MegatronModule], family: ModelFamily, weights: HFWeights, *, show_progress: bool = True
) -> tuple[int, list[str]]:
    """Export a model and compare each tensor with a Hugging Face directory, bit by bit. Collective.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.
        weights: The files.
        show_progress: Whether rank 0 shows a bar.

    Returns:
        The number of equal tensors, and one line for each that differs.
    """
    num_equal = 0
    differing = []
    for name, tensor in export_weights(chunks, family, cpu=True, show_progress=show_progress):
        if name not in weights.files:
            differing.append(f"{name}: not in {weights.directory}")
            continue
        original = weights.read(name)
        if original.dtype != tensor.dtype or original.shape != tensor.shape:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            differing.append(f"{name}: {found}, in the file {tuple(original.shape)} {original.dtype}")
        elif torch.equal(original.view(torch.uint8), tensor.contiguous().view(torch.uint8)):
            num_equal += 1
        else:
            count = int((original != tensor).sum())
            differing.append(f"{name}: {count} of {tensor.numel()} values differ")
    return num_equal, differing
