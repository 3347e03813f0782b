# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Check that a conversion loses nothing: compare a model's export with the files from which it was loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule

from megatron.bridge.models.conversion.export import export_weights
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.models.families import ModelFamily


@dataclass(frozen=True)
class TensorResult:
    """Result of the comparison of one tensor."""

    name: str
    shape: tuple[int, ...]
    found: str
    """`equal`: bit-exact; or what differs."""

    @property
    def is_equal(self) -> bool:
        """Whether every bit is the file's."""
        return self.found == "equal"


def compare_with_files(
    chunks: Sequence[MegatronModule], family: ModelFamily, weights: HFWeights, *, show_progress: bool = True
) -> list[TensorResult]:
    """Export a model and compare each tensor with a Hugging Face directory, bit-exact. Collective.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.
        weights: The files, from `open_weights`.
        show_progress: Whether rank 0 shows a bar.

    Returns:
        The result for each exported tensor, in the order of the model.
    """
    exported = export_weights(chunks, family, cpu=True, show_progress=show_progress, copies=False, stacked=False)
    return [TensorResult(name, tuple(tensor.shape), _compared(name, tensor, weights)) for name, tensor in exported]


def _compared(name: str, tensor: torch.Tensor, weights: HFWeights) -> str:
    if name not in weights.files:
        return "not in the files"
    original = weights.read(name).contiguous()
    if original.dtype != tensor.dtype or original.shape != tensor.shape:
        return f"{tensor.dtype}, in the file {original.dtype} {tuple(original.shape)}".replace("torch.", "")
    if torch.equal(original.view(torch.uint8), tensor.contiguous().view(torch.uint8)):
        return "equal"
    return f"max difference {float((original.double() - tensor.double()).abs().max()):.3g}"


def as_table(results: Sequence[TensorResult]) -> str:
    """The results as text, one line a tensor."""
    rows = [("tensor", "shape", "result"), *((one.name, str(list(one.shape)), one.found) for one in results)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {shape:{widths[1]}}  {found}" for name, shape, found in rows)
