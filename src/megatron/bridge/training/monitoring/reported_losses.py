# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a loss function reports beside the loss that is trained on, in each form that scripts have, added up.

A pair (sum, count), as a tensor of two or a tuple, is summed and divided: a mean per token. What has one element, a
tensor or a plain number, is averaged over micro-batches and data-parallel ranks. A figure may be reported by some of
them only: the mean is theirs.
"""

import hashlib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu

from megatron.bridge.utils.device import current_device


class Total(NamedTuple):
    """One figure's sum over the micro-batches of all data-parallel ranks."""

    sum: float
    counted: float
    """Tokens, or what else the loss function counted; of a plain figure the micro-batches that reported it."""

    is_per_token: bool
    """Whether the loss function gave the count."""

    def plus(self, other: "Total") -> "Total":
        """The total over both."""
        return Total(self.sum + other.sum, self.counted + other.counted, self.is_per_token and other.is_per_token)


def sum_and_count(name: str, value: Any, device: torch.device | str) -> tuple[torch.Tensor, bool]:
    """One micro-batch's figure as [sum, count].

    Args:
        name: Of the figure, for the error.
        value: What the loss function reported.
        device: To add it up on.

    Returns:
        A tensor [2], float32, and whether the count is the loss function's.

    Raises:
        ValueError: The form is none of those above.
    """
    parts = list(value) if isinstance(value, tuple | list) else [value]
    if not all(isinstance(part, torch.Tensor | numbers.Real | np.ndarray) for part in parts):
        raise _unknown_form(name, value)
    try:
        flat = [_flat(part, device) for part in parts]
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise _unknown_form(name, value, because=str(error).splitlines()[0]) from error
    elements = torch.cat(flat) if flat else torch.empty(0)
    if elements.numel() == 2:
        return elements, True
    if elements.numel() == 1:
        return torch.cat((elements, torch.ones_like(elements))), False
    raise _unknown_form(name, value)


def _flat(part: Any, device: torch.device | str) -> torch.Tensor:
    """Its elements, float32, on a device."""
    tensor = torch.as_tensor(part, device=device).detach()
    if tensor.is_complex():
        raise TypeError("it is complex")
    return tensor.float().reshape(-1)


def _unknown_form(name: str, value: Any, *, because: str | None = None) -> ValueError:
    because = "" if because is None else f" ({because})"
    shape = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    shape = f" of {len(value)}" if isinstance(value, tuple | list) else shape
    return ValueError(
        f"the loss function reports {name!r} as a {type(value).__name__}{shape}{because}: expected a number, a "
        "tensor of one element, or (sum, count) as a tensor of two or a pair"
    )


def sum_over_ranks(reported: list[dict[str, Any]]) -> dict[str, Total]:
    """Add up each figure over micro-batches and data-parallel ranks. Collective.

    Args:
        reported: Of each micro-batch of this rank, what its loss function reported; only the last pipeline stage has
            any.

    Returns:
        The same on every rank of a model-parallel group.

    Raises:
        ValueError: On all ranks: a figure has a form that can't be added up, on any of them.
    """
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return _totals(reported)
    shared: list[Any] = [None]
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        try:
            shared = [_totals(reported)]
        except ValueError as error:  # the other stages wait for it
            shared = [error]
    dist.broadcast_object_list(
        shared, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
    )
    if isinstance(shared[0], ValueError):
        raise shared[0]
    return shared[0]


def _totals(reported: list[dict[str, Any]]) -> dict[str, Total]:
    """Each figure's total, over the ranks of this stage.

    Raises:
        ValueError: On all of them: a figure has a form that can't be added up.
    """
    sums: dict[str, torch.Tensor] = {}
    forms: dict[str, bool] = {}
    problem = None
    try:
        sums, forms = _own_sums(reported, current_device())
    except ValueError as error:
        problem = str(error)
    forms = _agreed_forms(forms, problem)
    if not forms:
        return {}
    nothing = torch.zeros(2, device=current_device())
    total = torch.stack([sums.get(name, nothing) for name in forms])
    dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return {
        name: Total(added, counted, is_per_token)
        for (name, is_per_token), (added, counted) in zip(forms.items(), total.tolist(), strict=True)
    }


def _own_sums(reported: list[dict[str, Any]], device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, bool]]:
    """Of this rank's micro-batches, by name: [sum, count], and whether the count is the loss function's."""
    sums: dict[str, torch.Tensor] = {}
    forms: dict[str, bool] = {}
    for figures in reported:
        if not isinstance(figures, Mapping):
            raise ValueError(
                f"the loss function's last value is a {type(figures).__name__}: expected a dict of figures by name, "
                'such as {"lm loss": (sum, count)}'
            )
    for name, value in (pair for figures in reported for pair in figures.items()):
        if not isinstance(name, str):
            raise ValueError(f"the loss function names a figure {name!r}, a {type(name).__name__}: expected a text")
        found, is_per_token = sum_and_count(name, value, device)
        if forms.setdefault(name, is_per_token) != is_per_token:
            raise _two_forms(name)
        sums[name] = sums[name] + found if name in sums else found
    return sums, forms


def _agreed_forms(own: dict[str, bool], problem: str | None) -> dict[str, bool]:
    """The figures of all data-parallel ranks, in one order, and whether each is per token.

    Args:
        own: This rank's.
        problem: What is wrong with this rank's.

    Raises:
        ValueError: On all ranks of the stage: something is, on any of them.
    """
    group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    tensor_rank = mpu.get_tensor_model_parallel_rank()
    everyone: list[Any] = [(tensor_rank, own, problem)]
    if not _are_alike(repr((sorted(own.items()), problem)), group):
        everyone *= group.size()
        dist.all_gather_object(everyone, (tensor_rank, own, problem), group=group)
    problems = [said for _, _, said in everyone if said is not None]
    if problems:
        raise ValueError(problems[0])
    agreed: dict[str, bool] = {}
    for name, is_per_token in (pair for _, forms, _ in everyone for pair in forms.items()):
        if agreed.setdefault(name, is_per_token) != is_per_token:
            raise _two_forms(name)
    of_group = {name for its_tensor_rank, forms, _ in everyone if its_tensor_rank == tensor_rank for name in forms}
    return {name: agreed[name] for name in sorted(of_group)}


def _are_alike(text: str, group: dist.ProcessGroup) -> bool:
    """Whether all ranks of a group have the same text: one small collective, where a gathering takes several."""
    if group.size() == 1:
        return True
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    extremes = torch.tensor([number, -number], device=current_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    return largest == -smallest


def _two_forms(name: str) -> ValueError:
    return ValueError(
        f"the loss function reports {name!r} as (sum, count) and as a single number, by micro-batch or rank: they "
        "can't be averaged together; report one form, or give them two names"
    )


def means(totals: dict[str, Total]) -> dict[str, float]:
    """The mean of each total; NaN where nothing was counted."""
    return {name: total.sum / total.counted if total.counted else math.nan for name, total in totals.items()}


def tokens_of(totals: Iterable[Total]) -> int | None:
    """Tokens that counted in a loss; None where no loss function counted any."""
    counts = [total.counted for total in totals if total.is_per_token]
    return int(max(counts)) if counts else None
