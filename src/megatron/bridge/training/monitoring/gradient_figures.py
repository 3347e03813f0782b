# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The norm of each parameter's gradient, and the number of zeros in all of them, over the whole model.

They are read where gradients are complete: after the reduction, before the optimizer clips and steps. With the
distributed optimizer only a rank's own part of each gradient is reduced. So each element is read on the one rank that
owns it, and one sum over all ranks gives the whole.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.utils import unwrap_model

from megatron.bridge.training.monitoring.whole_model import is_counted_here, is_of_expert
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.device import current_device
from megatron.bridge.utils.distributed import all_gathered
from megatron.bridge.utils.names_over_ranks import name_over_all_ranks

NORM_PREFIX = "l2_norm/grad/"
"""What the names of gradients' norms begin with."""


class GradientFigures(NamedTuple):
    """Of the gradients of one step, before clipping and without the loss scale."""

    norms: dict[str, float]
    """L2 norm of each trained parameter's gradient, by the name that a checkpoint has for it, with its layer."""

    num_zeros: int
    """Elements that are 0, over all trained parameters."""


def read_gradients_if_shown(state: GlobalState, model: list[Any], optimizer: Any) -> GradientFigures | None:
    """The figures of the step that is being taken, if `logger` asks for any and some place takes those of this step.

    Args:
        state: The run; its train state has the number of steps taken.
        model: See `read_gradients`.
        optimizer: See `read_gradients`.
    """
    config = state.cfg.logger
    is_asked = config.log_l2_norm_grad_to_tensorboard or _counts_zeros(state)
    if not is_asked or not config.takes_figures_of(state.train_state.step + 1):
        return None
    scale = float(optimizer.get_loss_scale()) if state.cfg.model.fp16 else 1.0
    return read_gradients(model, optimizer, loss_scale=scale)


def wanted_gradients(state: GlobalState, found: GradientFigures | None) -> tuple[dict[str, float], int | None]:
    """Of what was read, the norms and the number of zeros, each if it is asked for."""
    if found is None:
        return {}, None
    norms = found.norms if state.cfg.logger.log_l2_norm_grad_to_tensorboard else {}
    return norms, found.num_zeros if _counts_zeros(state) else None


def _counts_zeros(state: GlobalState) -> bool:
    return state.cfg.logger.log_num_zeros_in_grad or state.cfg.optimizer.log_num_zeros_in_grad  # Core's own option


def read_gradients(model: list[Any], optimizer: Any, *, loss_scale: float = 1.0) -> GradientFigures:
    """Measure the gradients of the whole model. Collective over all ranks.

    Args:
        model: This rank's chunks, wrapped for data parallelism, with reduced gradients.
        optimizer: From `setup_optimizer`.
        loss_scale: What the loss was multiplied by.
    """
    own: dict[str, torch.Tensor] = {}
    for name, grad in _own_gradients(model, optimizer):
        squares = grad.float().square().sum(dtype=torch.float64)
        zeros = grad.numel() - torch.count_nonzero(grad)
        measured = torch.stack((squares, zeros.to(squares)))
        own[name] = own[name] + measured if name in own else measured
    names = list(dict.fromkeys(name for of_rank in all_gathered(list(own)) for name in of_rank))
    nothing = torch.zeros(2, dtype=torch.float64, device=current_device())
    sums = torch.stack([own.get(name, nothing) for name in names] or [nothing])
    dist.all_reduce(sums)
    squares, zeros = sums.T.tolist()
    norms = {name: math.sqrt(square) / loss_scale for name, square in zip(names, squares, strict=False)}
    return GradientFigures(norms, int(sum(zeros)))


def _own_gradients(model: list[Any], optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and elements of each gradient, as far as this rank counts them; no element is counted on two ranks."""
    owned = dict(_owned_ranges(optimizer))
    for chunk in model:
        bare = unwrap_model(chunk)
        for name, param in bare.named_parameters():
            if not param.requires_grad or not is_counted_here(param):
                continue
            grad = param.main_grad.detach().flatten()
            if not chunk.ddp_config.use_distributed_optimizer:
                begin, end = (0, grad.numel()) if _is_first_copy(param) else (0, 0)
            else:
                begin, end = owned.get(param, (0, 0))
            if end > begin:
                yield name_over_all_ranks(bare, name), grad[begin:end]


def _owned_ranges(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int]]]:
    """The elements of each parameter that this rank's distributed optimizers step on."""
    if isinstance(optimizer, ChainedOptimizer):
        for child in optimizer.chained_optimizers:
            yield from _owned_ranges(child)
    elif isinstance(optimizer, DistributedOptimizer) and not optimizer.is_stub_optimizer:
        if optimizer.distributed_optimizer_instance_id == 0:  # further ones hold copies of its shards
            for param in optimizer.model_param_gbuf_map:
                elements = optimizer._get_model_param_range_map(param)["param"]
                yield param, (elements.start, elements.end)


def _is_first_copy(param: torch.nn.Parameter) -> bool:
    """Whether this rank is the first of the data-parallel ranks, which hold the same gradients of a parameter."""
    if is_of_expert(param):
        return mpu.get_expert_data_parallel_rank() == 0
    return mpu.get_data_parallel_rank(with_context_parallel=True) == 0
