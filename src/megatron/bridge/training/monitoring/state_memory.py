# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The memory of a model and its optimizer on the device and on the host, counted from the objects themselves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.utils import unwrap_model

from megatron.bridge.offload_engine.overlap.hybrid import OverlappedStep
from megatron.bridge.offload_engine.split_masters import SPLIT_BYTES
from megatron.bridge.offload_engine.split_step import SplitStep
from megatron.bridge.offload_engine.state_formats import formats_of
from megatron.bridge.offload_engine.streamed_step import StreamedStep
from megatron.bridge.utils.device import is_on_device

MOMENTS = {"adam": 2, "sgd": 1}
"""How many tensors an optimizer keeps for each parameter, besides the master."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Memory of one rank in bytes, from the first step on."""

    weights: int
    """Trained and frozen weights and buffers, as the model computes with them."""
    gradients: int
    """The data-parallel wrapper's buffers, and FP32 copies of a 16-bit buffer's shard."""
    masters: int
    """FP32 weights on the device."""
    moments: int
    """The optimizer's own state on the device, and the buffers of a streamed one."""
    host_masters: int
    """FP32 weights on the host, or 16-bit rests of split ones, and what an overlapped step rounds them into."""
    host_moments: int
    host_gradients: int
    num_parameters: int
    """Parameters of this rank."""
    num_trained: int
    """Parameters of this rank that are trained."""


def count_state(model: list[Any], optimizer: Any, *, kind: str = "adam") -> StateBytes:
    """Count the memory of a rank after its first step.

    Storages are counted, so padding counts and views don't. Moments, which are created at the first step, are counted
    from the parameters that they belong to. Also works on meta tensors, which have no memory.

    Args:
        model: The chunks, wrapped for data parallelism.
        optimizer: From `setup_optimizer`.
        kind: The optimizer's name, see `MOMENTS`.
    """
    params = [param for chunk in model for param in chunk.parameters()]
    weights = _Storages([*params, *(buffer for chunk in model for buffer in unwrap_model(chunk).buffers())])
    gradients = _Storages(_gradient_buffers(model))
    masters = _Storages((), known=weights)
    host = dict.fromkeys(("moments", "gradients", "rounded"), 0)
    device = dict.fromkeys(("moments", "gradients"), 0)
    for torch_optimizer in _torch_optimizers(optimizer):
        outer = [param for group in torch_optimizer.param_groups for param in group["params"]]
        stepped_on = list(zip(outer, outer, strict=True))
        if isinstance(torch_optimizer, HybridDeviceOptimizer):
            stepped_on = list(torch_optimizer.param_to_inner_param.items())
        split = []
        if isinstance(torch_optimizer, SplitStep):
            split = torch_optimizer.split_masters
            host["rounded"] += torch_optimizer.transit_bytes + SPLIT_BYTES * sum(master.numel() for master in split)
        are_split = set(map(id, split))
        masters.add([*outer, *(param for _, param in stepped_on if id(param) not in are_split)])
        formats = formats_of(torch_optimizer)
        streamed: set[int] = set()
        if isinstance(torch_optimizer, StreamedStep) and torch_optimizer.pipeline is not None:
            device["moments"] += torch_optimizer.pipeline.buffer_bytes
            streamed = {id(master) for bucket in torch_optimizer.streamed_buckets for master in bucket.masters}
        if isinstance(torch_optimizer, OverlappedStep):
            host["rounded"] += torch_optimizer.num_rounded_bytes
        early = _bytes_of_early_gradients(torch_optimizer)
        for shard, param in stepped_on:
            is_on_host = not is_on_device(param)
            in_low_formats = is_on_host and not formats.are_fp32
            moment_bytes = formats.moment_bytes if in_low_formats else MOMENTS[kind] * param.element_size()
            (host if is_on_host else device)["moments"] += moment_bytes * param.numel()
            if is_on_host and id(param) not in streamed:  # whose gradient stays where it is
                host["gradients"] += early.get(id(param), formats.gradient.itemsize) * param.numel()
            widened = shard if is_on_host else param
            if gradients.are_16_bit and widened.dtype == torch.float32 and id(param) not in early:
                device["gradients"] += widened.numel() * widened.element_size()
    return StateBytes(
        weights=weights.num_bytes(on_device=True),
        gradients=gradients.num_bytes(on_device=True) + device["gradients"],
        masters=masters.num_bytes(on_device=True),
        moments=device["moments"],
        host_masters=masters.num_bytes(on_device=False) + host["rounded"],
        host_moments=host["moments"],
        host_gradients=host["gradients"],
        num_parameters=sum(param.numel() for param in params),
        num_trained=sum(param.numel() for param in params if param.requires_grad),
    )


def _bytes_of_early_gradients(torch_optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """By the id of a master on the host whose gradients cross as they are reduced: the bytes of each, stored as it was.

    The device drops its own FP32 copies of these before the step.
    """
    if not isinstance(torch_optimizer, OverlappedStep) or torch_optimizer.early is None:
        return {}
    return {
        id(master): dtype.itemsize
        for planned in torch_optimizer.early.planned()
        for dtype in planned.dtypes
        for master in planned.bucket.masters
    }


class _Storages:
    """The storages of some tensors, each counted once."""

    def __init__(self, tensors: Iterable[torch.Tensor], known: "_Storages | None" = None) -> None:
        self._known = known._found if known else {}
        self._found: dict[int, tuple[bool, int]] = {}
        self.are_16_bit = False
        self.add(tensors)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:  # meta storages have no address
                self._found[storage._cdata] = (is_on_device(tensor), storage.nbytes())
            self.are_16_bit |= tensor.element_size() == 2

    def num_bytes(self, *, on_device: bool) -> int:
        return sum(num_bytes for is_on_device, num_bytes in self._found.values() if is_on_device == on_device)


def _gradient_buffers(model: list[Any]) -> Iterator[torch.Tensor]:
    for chunk in model:
        if isinstance(chunk, DistributedDataParallel):
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                yield buffer.grad_data


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside Core's; none on a rank without trained parameters."""
    children = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else []
    for child in children:
        yield from _torch_optimizers(child)
    if not children and getattr(optimizer, "optimizer", None) is not None:
        yield optimizer.optimizer
