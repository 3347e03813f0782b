# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The low-rank path beside a linear layer, cut over the tensor-parallel ranks as the layer is.

S sequence, B batch, r the update's rank; tp tensor-parallel ranks. Only r channels ever travel between ranks:

    layer cut along its outputs    A [r, in] whole, B [out/tp, r]    gathered along S, or their gradient summed
    layer cut along its inputs     A [r, in/tp], B [out, r] whole    summed

Beside an expert's layer nothing travels, as the dispatcher of tokens sums what both give; of a whole matrix, each rank
then has a part of the gradient, and these are summed.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megatron.bridge.peft.linear_layout import CoreLinear, LinearLayout

INITIALISERS: dict[str, Callable[[torch.Tensor, torch.Generator], Any]] = {
    "xavier": lambda weight, generator: torch.nn.init.xavier_normal_(weight, generator=generator),
    "uniform": lambda weight, generator: torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator),
    "normal": lambda weight, generator: torch.nn.init.normal_(weight, mean=0.0, std=0.02, generator=generator),
    "zero": lambda weight, generator: torch.nn.init.zeros_(weight),
}


def _generator_for(name: str) -> torch.Generator:
    """Of a layer's own: whatever adapters this rank has before it, as not all ranks need, ranks that share it agree."""
    digest = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class LoRAOptions(Protocol):
    """What the path is told; `LoRA` says what each means."""

    dim: int
    alpha: float
    dropout: float
    dropout_position: Literal["pre", "post"]
    lora_A_init_method: str
    lora_B_init_method: str


class LowRankAdapter(torch.nn.Module):
    """alpha / r * B A x, added to the output of the layer it stands beside.

    Parameters, in the layer's dtype and on its device: `linear_in.weight` A, `linear_out.weight` B.
    """

    def __init__(
        self, weight: torch.Tensor, layout: LinearLayout, options: LoRAOptions, name: str, *, outputs: int | None = None
    ) -> None:
        """Make a path beside a layer.

        Args:
            weight: The layer's [out, in], this rank's part.
            layout: How the layer is cut.
            options: The size and what else there is to choose.
            name: The layer's whole name, counted over all ranks.
            outputs: Rows of this rank's part of B, where the path is beside some of the layer's; None: beside all.
        """
        super().__init__()
        self._generator = _generator_for(name)
        self.layout, self.dim, self.scale = layout, options.dim, options.alpha / options.dim
        self.dropout, self.drops_input = options.dropout, options.dropout_position == "pre"
        rows, inputs = weight.shape
        shape_out = (rows if outputs is None else outputs, options.dim)
        self.linear_in = self._linear((options.dim, inputs), options.lora_A_init_method, like=weight, cut=1)
        self.linear_out = self._linear(shape_out, options.lora_B_init_method, like=weight, cut=0)
        del self._generator

    def _linear(self, shape: tuple[int, int], init_method: str, *, like: torch.Tensor, cut: int) -> torch.nn.Linear:
        """One of the two matrices; the one at the layer's cut side is cut along the axis `cut`, the other whole."""
        layout = self.layout
        is_cut = layout.is_cut and (layout.split == "output") == (cut == 0)
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, device=like.device, dtype=like.dtype)
        whole = list(shape)
        whole[cut] *= layout.group.size() if is_cut else 1
        # Made whole on every rank and cut then, so that the values don't depend on the layout.
        initial = torch.empty(whole, dtype=like.dtype, device="meta" if like.is_meta else "cpu")
        if not like.is_meta:
            INITIALISERS[init_method](initial, self._generator)
        with torch.no_grad():
            linear.weight.copy_(initial.chunk(layout.group.size(), dim=cut)[layout.group.rank()] if is_cut else initial)
        weight: Any = linear.weight  # Core reads its marks as attributes
        # Core counts a parameter without this mark only on the first rank of the tensor-parallel group, which for an
        # expert's layer on a single rank is another group than its own.
        set_tensor_model_parallel_attributes(weight, is_cut or not layout.is_cut, cut if is_cut else -1, 1)
        weight.allreduce = getattr(like, "allreduce", True)  # False in an expert's layer, under expert parallel
        # Under sequence parallel a whole matrix sees a part of the sequence on each rank: its gradients are summed.
        weight.sequence_parallel = layout.sequence_parallel and not is_cut
        return linear

    def forward(self, linear: CoreLinear, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add the update.

        Args:
            linear: The layer.
            x: The layer's input [S, B, in], cut as the layer takes it.
            output: The layer's output [S, B, out], cut as the layer gives it.
        """
        return output + self.update(x)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """The update alone: alpha / r * B A x, cut as the layer's output."""
        layout = self.layout
        x = x if layout.normalized is None else layout.normalized(x)
        x = self._dropped(x, differs=layout.split == "input") if self.drops_input else x
        matrix_in = self._whole(self.linear_in.weight, is_cut=layout.split == "input")
        matrix_out = self._whole(self.linear_out.weight, is_cut=layout.split == "output")
        update = F.linear(self._over_ranks(F.linear(x, matrix_in)), matrix_out) * self.scale
        return update if self.drops_input else self._dropped(update, differs=layout.split == "output")

    def _over_ranks(self, hidden: torch.Tensor) -> torch.Tensor:
        """What A gave [S, B, r], as B needs it."""
        layout = self.layout
        if not layout.is_cut or layout.is_bare:
            return hidden
        if layout.split == "output":
            if layout.sequence_parallel:
                return gather_from_sequence_parallel_region(hidden, group=layout.group)
            return copy_to_tensor_model_parallel_region(hidden, group=layout.group)
        if layout.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden, group=layout.group)
        return reduce_from_tensor_model_parallel_region(hidden, group=layout.group)

    def _whole(self, parameter: torch.Tensor, *, is_cut: bool) -> torch.Tensor:
        """The parameter; where each rank has a part of its gradient, these are summed in the backward pass."""
        if is_cut or not self.layout.is_bare:
            return parameter
        return copy_to_tensor_model_parallel_region(parameter, group=self.layout.group)

    def _dropped(self, values: torch.Tensor, *, differs: bool) -> torch.Tensor:
        """Dropout. Ranks that hold different values (`differs`, or parts of the sequence) drop different ones."""
        if self.dropout == 0 or not self.training:
            return values
        differs = self.layout.is_cut and (differs or self.layout.sequence_parallel)
        with get_cuda_rng_tracker().fork() if differs else contextlib.nullcontext():
            return F.dropout(values, self.dropout)

    def merged(self, linear: CoreLinear) -> torch.Tensor:
        """The layer's weight with the update in it: this rank's part, in the weight's dtype."""
        return self.sum_of_weights(linear).to(linear.weight.dtype)

    def sum_of_weights(self, linear: CoreLinear) -> torch.Tensor:
        """W + alpha / r * B A in FP32, this rank's part."""
        return linear.weight.float() + self.update_of_weight()

    def update_of_weight(self) -> torch.Tensor:
        """What is added to the weight, alpha / r * B A in FP32, this rank's part."""
        return self.scale * self.linear_out.weight.float() @ self.linear_in.weight.float()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The parameters as parts of whole ones, so that a checkpoint fits any layout."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        layout, cut, own = self.layout, self.cut_axes(), self.state_dict(keep_vars=True)
        state = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            cut,
            sharded_offsets,
            tp_group=layout.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if layout.is_gated:
            singleton = metadata.get("singleton_local_shards", False)
            for key in (f"{prefix}{name}" for name in own if cut.get(name) == 0):
                state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, singleton)
        return state

    def cut_axes(self) -> dict[str, int]:
        """The parameters that the tensor-parallel ranks share, and along which axis."""
        return {"linear_out.weight": 0} if self.layout.split == "output" else {"linear_in.weight": 1}
