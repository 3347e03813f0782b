# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""DoRA: LoRA of a matrix's direction, its rows' lengths trained apart (Liu et al. 2024, arXiv 2402.09353)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megatron.bridge.peft.linear_layout import CoreLinear, LinearLayout, linear_layout
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRAOptions, LowRankAdapter


@dataclass
class DoRA(LoRA):
    """y = m * V / |V| x with V = W + alpha / dim * B A, |V| its rows' lengths, and m, which starts as |W|, trained."""

    alpha: float = 64
    """The update is scaled by alpha / dim."""

    def check(self) -> None:
        """See `PEFT.check`."""
        super().check()
        if self.share_expert_adapters:
            raise ValueError(
                "peft.share_expert_adapters=true with DoRA, which trains the lengths of each expert's own rows: set it "
                "to false, or take LoRA"
            )

    def adapter_for(self, linear: CoreLinear, name: str) -> torch.nn.Module:
        """See `LoRA.adapter_for`."""
        layout = linear_layout(linear, name)
        return MagnitudeAdapter(linear, layout, self.options_for(linear, name), name)


class MagnitudeAdapter(LowRankAdapter):
    """A low-rank path and the lengths of the sum's rows, `magnitude` [out], cut as the layer's output features.

    |V| counts as a constant in the backward pass (section 4.3 of the paper). It takes V, of the layer's size, in FP32
    for a moment in each forward pass. Dropout acts on the low-rank path alone.
    """

    def __init__(self, linear: CoreLinear, layout: LinearLayout, options: LoRAOptions, name: str) -> None:
        super().__init__(linear.weight, layout, options, name)
        lengths = self._row_lengths(linear.weight.detach().float()).to(linear.weight.dtype)
        self.magnitude = torch.nn.Parameter(lengths)
        magnitude: Any = self.magnitude  # Core reads its marks as attributes
        is_cut = layout.is_cut and layout.split == "output"
        set_tensor_model_parallel_attributes(magnitude, is_cut or not layout.is_cut, 0 if is_cut else -1, 1)
        magnitude.allreduce = getattr(linear.weight, "allreduce", True)
        magnitude.sequence_parallel = layout.sequence_parallel and not is_cut

    def forward(self, linear: CoreLinear, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """See `LowRankAdapter.forward`. A bias that the layer has added is not scaled."""
        bias = linear.bias if self.layout.adds_bias else None
        sum_without_bias = (output if bias is None else output - bias) + self.update(x)
        with torch.no_grad():
            lengths = self._row_lengths(self.sum_of_weights(linear)).to(output.dtype)
        magnitude = self._whole(self.magnitude, is_cut=self.layout.split == "output")
        scaled = sum_without_bias * (magnitude / lengths)
        return scaled if bias is None else scaled + bias

    def merged(self, linear: CoreLinear) -> torch.Tensor:
        """See `LowRankAdapter.merged`. Call on all tensor-parallel ranks."""
        whole = self.sum_of_weights(linear)
        scaled = whole * (self.magnitude.float() / self._row_lengths(whole)).unsqueeze(1)
        return scaled.to(linear.weight.dtype)

    def cut_axes(self) -> dict[str, int]:
        """See `LowRankAdapter.cut_axes`."""
        return {**super().cut_axes(), **({"magnitude": 0} if self.layout.split == "output" else {})}

    def _row_lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """The Euclidean lengths of a matrix's rows [out], which ranks may share along their inputs."""
        squares = weight.square().sum(dim=1)
        if self.layout.is_cut and self.layout.split == "input":
            dist.all_reduce(squares, group=self.layout.group)
        return squares.sqrt()
