# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""An optimizer's whole state, put together from the slices of all ranks: the same whatever the layout.

It looks at what is stepped on, never at what a checkpoint would hold, so that the two can be compared.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params


@dataclass(frozen=True)
class Slice:
    """What one rank steps on of one parameter."""

    name: str
    """The parameter's, its layer counted over all pipeline stages, its expert over all expert-parallel ranks."""
    tensor_rank: int
    shape: tuple[int, ...]
    """The parameter's, on its tensor-parallel rank."""
    axis: int | None
    """Along which tensor-parallel ranks cut it; None where each has all of it."""
    is_gated: bool
    """Two matrices on top of each other, each of which is cut."""
    start: int
    tensors: dict[str, torch.Tensor]
    """FP32, flat, from `start` on: `master`, and Adam's moments or SGD's momentum."""
    step: float
    """Adam's counter; 0 for SGD."""
    held_bytes: int
    """Of memory that the tensors keep alive: more than their own where they are views."""


def slices_of(model: list[Any], optimizer: Any) -> list[Slice]:
    """A copy of all that this rank steps on."""
    names = _names(model)
    return [
        _slice(child, param, stepped_on, start, *names[param])
        for child in optimizer.chained_optimizers
        for param, stepped_on, start in _stepped_on(child)
    ]


def _stepped_on(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Each parameter, what an optimizer steps on for it on this rank, and from which of its elements on."""
    if isinstance(optimizer, DistributedOptimizer):
        for param, (group, place) in optimizer.model_param_group_index_map.items():
            stepped_on = optimizer.optimizer.param_groups[group]["params"][place]
            yield param, stepped_on, optimizer._get_model_param_range_map(param)["param"].start
        return
    of_masters = {}
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for params, masters in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            of_masters.update(zip(masters, params, strict=True))
    for stepped_on in (param for group in optimizer.optimizer.param_groups for param in group["params"]):
        yield of_masters.get(stepped_on, stepped_on), stepped_on, 0


def whole_state(slices_by_rank: list[list[Slice]], *, vocab_size: int) -> dict[str, torch.Tensor]:
    """Masters and moments by `kind name`, and the step, from every rank's slices. All elements must be there once.

    Where several ranks keep the same (tied embeddings, weights that tensor-parallel ranks share) they must agree.
    """
    slices = [one for of_a_rank in slices_by_rank for one in of_a_rank]
    assert len({one.step for one in slices}) == 1, {one.step for one in slices}
    whole = {"step": torch.tensor(slices[0].step)}
    for name in dict.fromkeys(one.name for one in slices):
        of_name = [one for one in slices if one.name == name]
        ranks = sorted({one.tensor_rank for one in of_name})
        for kind in of_name[0].tensors:
            parts = [_joined([one for one in of_name if one.tensor_rank == rank], kind) for rank in ranks]
            tensor = _uncut(parts, of_name[0].axis, is_gated=of_name[0].is_gated)
            whole[f"{kind} {name}"] = tensor[:vocab_size] if "embedding" in name or "output_layer" in name else tensor
    return whole


def _names(model: list[Any]) -> dict[torch.Tensor, tuple[str, bool]]:
    """Each parameter's name over all stages, and whether it is gated."""
    from megatron.core.utils import unwrap_model

    names = {}
    for chunk in map(unwrap_model, model):
        for name, param in chunk.named_parameters():
            layer = re.match(r"decoder\.layers\.(\d+)\.", name)
            if layer:
                number = chunk.decoder.layers[int(layer[1])].layer_number - 1
                name = f"decoder.layers.{number}.{name[layer.end() :]}"
            name = re.sub(r"local_experts\.(\d+)", partial(_expert, chunk.config), name)
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            names[param] = name, "linear_fc1" in name and chunk.config.gated_linear_unit
    return names


def _expert(config: Any, local: re.Match) -> str:
    from megatron.core import mpu

    on_each_rank = config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    return f"experts.{int(local[1]) + on_each_rank * mpu.get_expert_model_parallel_rank()}"


def _tensor_rank(name: str) -> int:
    from megatron.core import mpu

    is_expert = ".experts." in name
    return mpu.get_expert_tensor_parallel_rank() if is_expert else mpu.get_tensor_model_parallel_rank()


def _slice(
    optimizer: Any, param: torch.Tensor, stepped_on: torch.Tensor, start: int, name: str, is_gated: bool
) -> Slice:
    inner = optimizer.optimizer
    stepping = [inner]
    if isinstance(inner, HybridDeviceOptimizer):
        stepped_on, stepping = inner.param_to_inner_param[stepped_on], inner.sub_optimizers
    (state,) = [one.state[stepped_on] for one in stepping if stepped_on in one.state] or [{}]  # SGD before its first
    moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq", "momentum_buffer") if key in state}
    tensors = {"master": stepped_on, **moments}
    return Slice(
        name=name,
        tensor_rank=_tensor_rank(name),
        shape=tuple(param.shape),
        axis=param.partition_dim if getattr(param, "tensor_model_parallel", False) else None,
        is_gated=is_gated,
        start=start,
        tensors={kind: tensor.detach().clone().cpu().view(-1) for kind, tensor in tensors.items()},
        step=float(state.get("step", 0)),
        held_bytes=sum(tensor.untyped_storage().nbytes() for tensor in moments.values()),
    )


def _joined(slices: list[Slice], kind: str) -> torch.Tensor:
    """One tensor-parallel rank's parameter, from its data-parallel ranks."""
    flat = torch.zeros(math.prod(slices[0].shape))
    filled = torch.zeros_like(flat, dtype=torch.bool)
    for one in slices:
        place = slice(one.start, one.start + one.tensors[kind].numel())
        again = filled[place]
        assert torch.equal(flat[place][again], one.tensors[kind][again]), f"ranks disagree about {kind} {one.name}"
        flat[place], filled[place] = one.tensors[kind], True
    assert filled.all(), f"no rank steps on a part of {slices[0].name}"
    return flat.view(slices[0].shape)


def _uncut(parts: list[torch.Tensor], axis: int | None, *, is_gated: bool) -> torch.Tensor:
    if axis is None:
        assert all(torch.equal(part, parts[0]) for part in parts), "tensor-parallel ranks disagree"
        return parts[0]
    if is_gated:
        return torch.cat([half for at in (0, 1) for half in (part.chunk(2)[at] for part in parts)])
    return torch.cat(parts, dim=axis)
