# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Optimizer state that any layout can read: each rank writes and reads its own slice, under the weight's name.

In the fully_reshardable format a parameter's master and moments are tensors of the parameter's shape. Core assembles
them from the state of the whole data-parallel group, which it gathers on every rank:

* If buckets are padded, it cuts parameters of later buckets out at the wrong offset (Megatron-LM PR 5077).
* A load keeps views of the gathered state, and so keeps all of it in memory.
* A load fails with KeyError on the step that torch's Adam keeps in its state.

Here nothing is gathered. A rank owns a range of a parameter's flat elements. Such a range is a few boxes in the
parameter's shape, and these are saved and loaded in place. The files are the same as Core's. This repair also serves
the distributed optimizer without offload.
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
"""The `ShardedTensor`s of one tensor, or what was loaded into them, by number. Ranks have different numbers of them:
Core can merge dicts of different sizes, but not lists."""


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
    """This rank's slices of a parameter's master and moments. The step is saved with the param groups."""
    tensors = optimizer._get_main_param_and_optimizer_states(param)
    return {key: tensor.detach() for key, tensor in tensors.items() if key != "step"}


def _fill(tensor: torch.Tensor, boxes: Boxes) -> None:
    """Copy what was loaded into the tensor, unless it was read in place."""
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
    """Describe a flat slice of a parameter's state for Core.

    Args:
        weight: The parameter's `ShardedTensor`, or the `ShardedTensorFactory` that makes several of them.
        key: Name of the state, such as `exp_avg`.
        tensor: The slice, flat FP32: the parameter's elements from `start` on.
        start: Offset in the flat elements of the parameter on this tensor-parallel rank.
        instance: Number of the distributed optimizer's instance; the first one writes.
    """
    end = start + tensor.numel()
    for part, first in _contiguous_parts(weight):
        begin, stop = max(start, first), min(end, first + math.prod(part.local_shape))
        if begin >= stop:
            continue
        done = begin - start
        for box in _boxes_of_range(part.local_shape, begin - first, stop - first):
            shape = (1,) * part.prepend_axis_num + box.shape  # a tensor that is no regular grid has all axes in Core
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
    """The stored tensors that make up a parameter, each with its offset in the parameter's flat elements.

    Raises:
        RuntimeError: The stored tensors are not contiguous parts of the parameter, in order.
    """
    if not isinstance(weight, ShardedTensorFactory):
        yield weight, 0
        return
    # Let the factory cut a tensor without memory, to see which views it takes.
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
    """Cut a range of flat elements into boxes, in order: the rest of a row, whole rows, the start of a row."""
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
        defect="the fully_reshardable format holds wrong state behind the first padded bucket, can't be loaded by "
        "torch's Adam, and keeps the whole data-parallel group's state on each rank",
        threads=("NVIDIA/Megatron-LM PR 5077",),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_own_slices,
        is_needed=_gathers_the_whole_state,
    ),
)
