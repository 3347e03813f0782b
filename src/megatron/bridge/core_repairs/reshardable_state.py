# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Optimizer state that another layout can read: each rank writes and reads its own slice, under the weight's name.

In the fully_reshardable format a parameter's master and moments are tensors of its own shape. Core makes them of the
whole data-parallel group's state, which it gathers on every rank. There it cuts parameters of later buckets out at the
wrong place where buckets are padded (Megatron-LM PR 5077); a load keeps views of the whole, and so all of it, alive,
and dies with KeyError on the step that torch's Adam keeps beside its moments. Here nothing is gathered: a rank's slice
of a parameter, a range of its flat elements, is a few boxes of the parameter's shape, and those are saved and loaded
in place. What is on disk is the same. This serves the distributed optimizer without offload as well.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of

Boxes = dict[int, Any]
"""`ShardedTensor`s of one tensor, or what was loaded into them, by number: Core merges dicts of any size."""


def _own_slices(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class OwnSlices(base):
        def sharded_param_state_fully_reshardable(
            self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
        ) -> dict[int, dict[str, Boxes]]:
            weights, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
            by_param = {weight.data: weight for weight in nested_values(weights)}
            return {
                index: {key: self._boxes(by_param, param, key, tensor) for key, tensor in _saved(self, param).items()}
                for index, param in enumerate(self.model_param_group_index_map)
            }

        def _boxes(self, weights: dict[torch.Tensor, Any], param: torch.Tensor, key: str, tensor: Any) -> Boxes:
            if param not in weights:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} is not in the model's sharded state: its optimizer "
                    "state has no name to be saved under; set checkpoint.dist_ckpt_optim_fully_reshardable=false"
                )
            owned = self._get_model_param_range_map(param)["param"]
            instance = self.distributed_optimizer_instance_id
            return dict(enumerate(_sharded_boxes(weights[param], key, tensor, owned.start, instance)))

        @torch.no_grad()
        def load_parameter_state_from_fully_reshardable(self, state_dict: dict[int, dict[str, Boxes]]) -> None:
            for index, param in enumerate(self.model_param_group_index_map):
                tensors = self._get_main_param_and_optimizer_states(param)
                for key, boxes in state_dict[index].items():
                    _fill(tensors[key], boxes)
                self._set_main_param_and_optimizer_states(param, tensors)
            if isinstance(self.optimizer, HybridDeviceOptimizer):
                self.optimizer._sync_hdo_state_to_sub_optimizers()

    return OwnSlices


def _saved(optimizer: DistributedOptimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's master and moments, this rank's slices; its step is in the param groups."""
    tensors = optimizer._get_main_param_and_optimizer_states(param)
    return {key: tensor.detach() for key, tensor in tensors.items() if key != "step"}


def _fill(tensor: torch.Tensor, boxes: Boxes) -> None:
    """Put what was loaded in its place, unless it was read there."""
    flat, start = tensor.detach().view(-1), 0
    for _, box in sorted(boxes.items()):
        place = flat[start : start + box.numel()]
        if box.data_ptr() != place.data_ptr():
            place.copy_(box.reshape(-1))
        start += box.numel()
    assert start == flat.numel(), (start, flat.numel())


class _Box(NamedTuple):
    """A block of a tensor whose elements are contiguous."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def _sharded_boxes(weight: Any, key: str, tensor: torch.Tensor, start: int, instance: int) -> Iterator[ShardedTensor]:
    """The description, for Core, of a flat slice of a parameter's state.

    Args:
        weight: The parameter's own `ShardedTensor`, or the `ShardedTensorFactory` that makes several of it.
        key: The state's name.
        tensor: FP32, flat: the parameter's elements from `start` on.
        start: In elements of the parameter on this tensor-parallel rank.
        instance: The distributed optimizer's, of which the first one saves.
    """
    end = start + tensor.numel()
    for part, first in _contiguous_parts(weight):
        begin, stop = max(start, first), min(end, first + math.prod(part.local_shape))
        if begin >= stop:
            continue
        done = begin - start
        for box in _boxes_of_range(part.local_shape, begin - first, stop - first):
            shape = (1,) * part.prepend_axis_num + box.shape  # Core's irregular tensors have all axes
            offset = (0,) * part.prepend_axis_num + box.offset
            size = math.prod(box.shape)
            yield replace(
                part,
                key=f"optimizer.state.{key}.{part.key}",
                data=tensor[done : done + size].view(shape),
                dtype=tensor.dtype,
                local_shape=shape,
                global_offset=tuple(map(sum, zip(part.global_offset, offset, strict=True))),
                axis_fragmentations=None,
                prepend_axis_num=0,
                replica_id=(*part.replica_id[:2], instance),
            )
            done += size


def _contiguous_parts(weight: Any) -> Iterator[tuple[ShardedTensor, int]]:
    """The stored tensors that a parameter is made of, each with its place among the parameter's flat elements.

    Raises:
        RuntimeError: The parameter is rearranged before it is stored.
    """
    if not isinstance(weight, ShardedTensorFactory):
        yield weight, 0
        return
    # A tensor without memory, to see which views the factory takes.
    whole = torch.empty(weight.data.shape, device="meta")
    next_element = 0
    for part in nested_values({0: replace(weight, data=whole).build()}):
        is_view = part.data.untyped_storage()._cdata == whole.untyped_storage()._cdata
        if not is_view or not part.data.is_contiguous() or part.data.storage_offset() != next_element:
            break
        yield part.without_data(), next_element
        next_element += part.data.numel()
    if next_element != whole.numel():
        raise RuntimeError(
            f"{weight.key} is rearranged before it is stored: its optimizer state can't be saved by slices; "
            "set checkpoint.dist_ckpt_optim_fully_reshardable=false"
        )


def _boxes_of_range(shape: tuple[int, ...], start: int, end: int) -> Iterator[_Box]:
    """Cut a range of a tensor's flat elements into blocks, in order: a part of a row, whole rows, a part of a row."""
    if len(shape) <= 1:
        yield _Box((start,) * len(shape), (end - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    while start < end:
        if start % row == 0 and end - start >= row:
            count = (end - start) // row
            yield _Box((start // row,) + (0,) * (len(shape) - 1), (count, *shape[1:]))
            start += count * row
        else:
            stop = min(end, (start // row + 1) * row)
            for box in _boxes_of_range(shape[1:], start % row, stop - start // row * row):
                yield _Box((start // row, *box.offset), (1, *box.shape))
            start = stop


def _gathers_the_whole_state(optimizer: DistributedOptimizer) -> bool:
    source = source_of(DistributedOptimizer.sharded_param_state_fully_reshardable)
    return "self.get_parameter_state_dp_zero(" in source


REPAIRS = (
    Repair(
        name="reshardable state",
        defect="the fully_reshardable format holds wrong state past the first padded bucket, can't be read back by "
        "torch's Adam, and keeps the whole group's state on each rank",
        threads=("NVIDIA/Megatron-LM PR 5077",),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_own_slices,
        is_needed=_gathers_the_whole_state,
    ),
)
