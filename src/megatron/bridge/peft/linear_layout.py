# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How a linear layer of Core's is split over the tensor-parallel ranks, which an adapter beside it must know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from megatron.bridge.peft.grouped_experts import GroupedExpert

CoreLinear: TypeAlias = Any
"""A linear layer of Core's or of Transformer Engine's, or an expert of a grouped one. They share no class that says
what all of them have."""

Split = Literal["output", "input"]

_SPLITS: dict[str, Split] = {
    "ColumnParallelLinear": "output",
    "RowParallelLinear": "input",
    "TEColumnParallelLinear": "output",
    "TELayerNormColumnParallelLinear": "output",
    "TERowParallelLinear": "input",
    "TEColumnParallelGroupedLinear": "output",
    "TERowParallelGroupedLinear": "input",
}
"""By class, known by its name: Transformer Engine may not be installed."""
_GROUPED = tuple(kind for kind in _SPLITS if "Grouped" in kind)


@dataclass(frozen=True)
class LinearLayout:
    """A linear layer as an adapter sees it."""

    split: Split
    """Which features the ranks share among them."""
    group: Any
    """The tensor-parallel process group."""
    sequence_parallel: bool
    """Whether the other side's activations are cut along the sequence."""
    is_bare: bool
    """Whether the caller moves the activations, as the dispatcher of experts does: it passes whole inputs where outputs
    are cut, adds up the outputs where inputs are, and the same of gradients. The layer has no collective of its own."""
    is_gated: bool
    """Whether the weight is two matrices on top of each other, each of which is cut."""
    adds_bias: bool
    """Whether the layer's output has a bias in it; else there is none, or it is left to the caller."""
    normalized: Callable[[torch.Tensor], torch.Tensor] | None
    """The norm that the layer applies to its input itself; None where it doesn't."""

    @property
    def is_cut(self) -> bool:
        """Whether there is more than one rank to share it."""
        return self.group.size() > 1


def linear_layout(linear: CoreLinear, name: str) -> LinearLayout:
    """Look at a linear layer.

    Args:
        linear: Core's or Transformer Engine's.
        name: Its whole name, for errors.

    Raises:
        ValueError: It is no linear layer that an adapter can stand beside.
    """
    weight = getattr(linear, "weight", None)
    linear = linear.grouped if isinstance(linear, GroupedExpert) else linear
    kind = _kind(linear)
    if kind is None:
        raise ValueError(_refusal(name, f"a {type(linear).__name__}", f"one of {', '.join(_SPLITS)}"))
    if weight is None:
        expected = "one for each expert (model.moe_single_grouped_weight=false)"
        expected = expected if kind in _GROUPED else "an output layer that is not tied"
        raise ValueError(_refusal(name, "without a weight of its own", expected))
    if getattr(linear.config, "use_transformer_engine_op_fuser", False):
        expected = "layers that are called one by one (model.use_transformer_engine_op_fuser=false)"
        raise ValueError(_refusal(name, "a part of Transformer Engine's fused operations", expected))
    group = linear._tp_group if kind.startswith("TE") else linear.tp_group
    gathers = not kind.startswith("TE") and (linear.gather_output if kind[0] == "C" else not linear.input_is_parallel)
    if gathers and group.size() > 1:
        raise ValueError(_refusal(name, "gathering its output or cutting its input itself", "parallel activations"))
    places = name.split(".")
    if "experts" in places and group.size() not in (1, linear.config.tensor_model_parallel_size):
        # Core 0.16 counts what all ranks of an expert hold by the other ranks, those of tensor parallelism.
        expected = "model.expert_tensor_parallel_size=1, or model.tensor_model_parallel_size of the same"
        raise ValueError(_refusal(name, f"an expert's on {group.size()} ranks", expected))
    overlaps = "shared_experts" in places and linear.config.moe_shared_expert_overlap
    is_bare = group.size() > 1 and ("experts" in places or overlaps)
    return LinearLayout(
        split=_SPLITS[kind],
        group=group,
        sequence_parallel=group.size() > 1 and not is_bare and linear.sequence_parallel,
        is_bare=is_bare,
        is_gated=name.endswith("linear_fc1") and linear.config.gated_linear_unit,
        adds_bias=linear.use_bias and not linear.te_return_bias
        if kind.startswith("TE")
        else linear.bias is not None and not linear.skip_bias_add,
        normalized=_fused_norm(linear) if kind == "TELayerNormColumnParallelLinear" else None,
    )


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer of Core's or Transformer Engine's that ranks share."""
    return _kind(module) is not None


def is_grouped(module: torch.nn.Module) -> bool:
    """Whether a module is Transformer Engine's linear layer of all experts."""
    return _kind(module) in _GROUPED


def _kind(linear: CoreLinear) -> str | None:
    return next((cls.__name__ for cls in type(linear).__mro__ if cls.__name__ in _SPLITS), None)


def _refusal(name: str, found: str, expected: str) -> str:
    return f"peft.target_modules matches {name}, which is {found}: expected {expected}; name it in peft.exclude_modules"


def _fused_norm(linear: CoreLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm inside Transformer Engine's LayerNormLinear, again: its result doesn't leave the layer."""

    def normalized(x: torch.Tensor) -> torch.Tensor:
        weight, bias = linear.layer_norm_weight, linear.layer_norm_bias
        if linear.zero_centered_gamma:  # in FP32, as there: beside 1, a 16-bit weight loses its last bits
            weight, bias = 1 + weight.float(), None if bias is None else bias.float()
        whole = x.to(weight.dtype)
        if linear.normalization == "RMSNorm":
            return F.rms_norm(whole, weight.shape, weight, linear.eps).type_as(x)
        return F.layer_norm(whole, weight.shape, weight, bias, linear.eps).type_as(x)

    return normalized
