# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Store parameters that only some layers, or some experts, have.

Core stores a parameter of all layers as one tensor, stacked along an additional first axis, and one of all experts with
a second such axis. The stack must be complete. If only some layers have adapters, or only some layers are trained, Core
refuses to store it. Here the elements of an incomplete stack are stored as separate tensors, `KEY[layer]` or
`KEY[layer, expert]`. A complete stack remains one tensor.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory

from megatron.bridge.utils.distributed import all_gathered

Element = tuple[int, ...]
"""Index of a tensor in a stack: its layer, or its layer and expert."""


def split_partial_stacks(
    state: ShardedStateDict, counts: Callable[[torch.Tensor], bool] = lambda tensor: True
) -> ShardedStateDict:
    """Split the incomplete stacks in a model's sharded state. Collective.

    Args:
        state: This rank's part of the state to store or read: nested dicts and lists. Not changed.
        counts: Whether a tensor, given its data, will be stored. All others are returned unchanged.

    Returns:
        The same structure, with each element of an incomplete stack under a key of its own.
    """
    ours: dict[str, tuple[Element, set[Element]]] = {}
    for value in nested_values(state):
        if _is_stored(value, counts):
            for tensor in _stacked(value):
                sizes, elements = ours.setdefault(tensor.key, (_first_axes(tensor, tensor.global_shape), set()))
                elements.add(_first_axes(tensor, tensor.global_offset))
    stacks: dict[str, tuple[Element, set[Element]]] = {}
    for of_a_rank in all_gathered(ours):
        for key, (sizes, elements) in of_a_rank.items():
            stacks.setdefault(key, (sizes, set()))[1].update(elements)
    with_holes = {key for key, (sizes, elements) in stacks.items() if len(elements) < math.prod(sizes)}

    def apart(value: Any) -> Any:
        has_holes = _is_stored(value, counts) and any(tensor.key in with_holes for tensor in _stacked(value))
        return _by_itself(value) if has_holes else value

    return dict_list_map_outplace(apart, state) if with_holes else state


def _is_stored(value: Any, counts: Callable[[torch.Tensor], bool]) -> bool:
    return isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.data is not None and counts(value.data)


def _stacked(value: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The elements of stacks that make up a stored value."""
    if isinstance(value, ShardedTensorFactory):
        # Only the description is needed, so a tensor without memory will do.
        value = replace(value, data=torch.empty(value.data.shape, dtype=value.data.dtype, device="meta")).build()
    return [tensor for tensor in nested_values({0: value}) if tensor.prepend_axis_num]


def _first_axes(tensor: ShardedTensor, numbers: tuple[int, ...]) -> Element:
    return tuple(numbers[: tensor.prepend_axis_num])


def _by_itself(value: ShardedTensor | ShardedTensorFactory) -> Any:
    """An element of a stack as a separate tensor."""
    if isinstance(value, ShardedTensorFactory):

        def build(*args: Any) -> Any:
            return dict_list_map_outplace(_by_itself, value.build_fn(*args))

        return replace(value, build_fn=build)
    axes = value.prepend_axis_num
    if not axes:
        return value
    fragmentations = value.axis_fragmentations
    return replace(
        value,
        key=f"{value.key}{list(_first_axes(value, value.global_offset))}",
        global_shape=value.global_shape[axes:],
        global_offset=value.global_offset[axes:],
        axis_fragmentations=None if fragmentations is None else fragmentations[axes:],
        prepend_axis_num=0,
    )
