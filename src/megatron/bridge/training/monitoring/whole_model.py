# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Sums over the parameters of the whole model, each counted once, whatever the layout."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron.bridge.utils.device import current_device


@torch.no_grad()
def sum_over_parameters(model: list[Any], measure: Callable[[torch.nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """The sum of what `measure` says of each parameter. Collective.

    Args:
        model: This rank's chunks.
        measure: Gives a tensor of one shape for every parameter; it is summed in FP64, which counts exactly to 2^53.

    Returns:
        The sum over the whole model, FP64, on the current device; the same on the ranks that share a copy of it.
    """
    zero = torch.zeros_like(measure(torch.nn.Parameter(torch.zeros(1))), dtype=torch.float64, device=current_device())
    dense, experts = zero, zero.clone()
    for param in (param for chunk in model for param in chunk.parameters()):
        if is_counted_here(param):
            total = experts if is_of_expert(param) else dense
            total += measure(param).to(total)
    dist.all_reduce(dense, group=mpu.get_model_parallel_group())
    dist.all_reduce(experts, group=mpu.get_expert_tensor_model_pipeline_parallel_group())
    return dense + experts


def is_of_expert(param: torch.nn.Parameter) -> bool:
    """Whether a parameter is an expert's, of which the ranks of an expert-parallel group hold others each."""
    return not getattr(param, "allreduce", True)  # Core's mark


def is_counted_here(param: torch.nn.Parameter) -> bool:
    """Whether this rank is the one that counts a parameter, among the ranks that share a copy of the model."""
    if is_of_expert(param):
        # Whole on each of the expert's own tensor-parallel ranks: a bias, or one side of an adapter.
        return getattr(param, "tensor_model_parallel", True) or mpu.get_expert_tensor_parallel_rank() == 0
    return param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)
