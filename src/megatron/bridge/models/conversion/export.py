# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A Megatron model's weights as Hugging Face tensors: one at a time, whole, on every rank."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from tqdm import tqdm

from megatron.bridge.models.conversion.expert_stacks import stack_experts
from megatron.bridge.models.conversion.mapping import Segment
from megatron.bridge.models.conversion.tasks import (
    ConversionTask,
    WeightPlace,
    all_places,
    exchange_group,
    local_tasks,
    model_config,
    tensor_parallel_group,
)
from megatron.bridge.models.families import ModelFamily
from megatron.bridge.utils.device import current_device, host_view
from megatron.bridge.utils.distributed import is_rank_0


class HFWeightTuple(NamedTuple):
    """One tensor of an export."""

    param_name: str
    """Its Hugging Face name."""
    weight: torch.Tensor
    """The whole tensor."""


def export_weights(
    chunks: Sequence[MegatronModule],
    family: ModelFamily,
    *,
    cpu: bool = False,
    show_progress: bool = True,
    tasks: Sequence[ConversionTask] | None = None,
    copies: bool = True,
    stacked: bool = True,
) -> Iterator[HFWeightTuple]:
    """Yield (name, tensor) pairs in the order of the layers. Collective: every rank must take every pair.

    Args:
        chunks: The model, wrapped or not.
        family: Its table of mappings.
        cpu: Yield tensors in host memory.
        show_progress: Whether rank 0 shows a bar.
        tasks: Only these weights of this rank; None: all.
        copies: False: a tensor may be a view of the model's own weight, to be read before that changes.
        stacked: False: experts that files keep in one tensor come one by one, by the names in the table.

    Yields:
        The Hugging Face name and the whole tensor, in the model's dtype; the same on all ranks.

    Raises:
        ValueError: `tasks` holds some of the experts that files keep in one tensor.
    """
    tensors = _exported(chunks, family, cpu=cpu, show_progress=show_progress, tasks=tasks, copies=copies)
    if family.expert_stacks and stacked:
        tensors = stack_experts(tensors, family.expert_stacks, num_experts=model_config(chunks).num_moe_experts)
    for name, tensor in tensors:
        yield HFWeightTuple(name, tensor)


def _exported(
    chunks: Sequence[MegatronModule],
    family: ModelFamily,
    *,
    cpu: bool,
    show_progress: bool,
    tasks: Sequence[ConversionTask] | None,
    copies: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor that the table names."""
    config = model_config(chunks)
    by_chunk = local_tasks(chunks, family) if tasks is None else [tasks]
    mine = {task.megatron_name: task for chunk in by_chunk for task in chunk if not task.place.is_copy}
    places = exported_places(by_chunk)
    with tqdm(places, desc="exporting weights", unit="tensor", disable=not (show_progress and is_rank_0())) as bar:
        for place in bar:
            task = mine.get(place.mapping.megatron_name)
            for name, tensor in _hf_tensors(place, task, config, copies=copies):
                yield name, (tensor.cpu() if copies else host_view(tensor)) if cpu else tensor


def exported_places(tasks: Sequence[Sequence[ConversionTask]]) -> list[WeightPlace]:
    """The weights that an export consists of, in order. Collective."""
    return [place for place in all_places(tasks) if not place.is_copy]


def _hf_tensors(
    place: WeightPlace, task: ConversionTask | None, config: TransformerConfig, *, copies: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """One weight's Hugging Face tensors on every rank; `task` is None on the ranks that don't hold it."""
    group = exchange_group(place.mapping)
    many_ranks = group.size() > 1 or tensor_parallel_group(place.mapping).size() > 1
    device = current_device() if many_ranks or task is None else task.parameter.device
    dim = place.mapping.dim or 0
    segments = place.segments(config)
    parts: list[tuple[Segment, torch.Tensor]] = []
    if task is not None:
        rows = _whole_weight(task, device).split([segment.length for segment in segments], dim)
        parts = list(zip(segments, rows, strict=True))
    for name, shape in place.hf_shapes(config).items():
        mine = [(segment, rows) for segment, rows in parts if segment.hf_name == name]
        if len(mine) == 1 and not copies:
            tensor = mine[0][1]
        else:
            tensor = torch.empty(shape, dtype=place.dtype, device=device)
            for segment, rows in mine:
                tensor.narrow(dim, segment.start, segment.length).copy_(rows)
        if group.size() > 1:
            dist.broadcast(tensor, place.owner, group=group)
        yield name, tensor


def _whole_weight(task: ConversionTask, device: torch.device) -> torch.Tensor:
    """The weight over all tensor-parallel ranks, laid end to end along its split axis."""
    shard = task.tensor()
    if shard.device != device:
        shard = shard.to(device)
    group = tensor_parallel_group(task.place.mapping)
    if task.place.mapping.dim is None or group.size() == 1:
        return shard
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim=task.place.mapping.dim)
