# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Sum up what a loss function reports, in each form that scripts use.

A pair (sum, count), as a tensor of two elements or a tuple, is summed and divided, which gives a mean per token. A
single number or a tensor of one element is averaged over micro-batches and data-parallel ranks. If only some of them
report a metric, the mean is over those.
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
    """One metric, summed over the micro-batches of all data-parallel ranks."""

    sum: float
    counted: float
    """Tokens, or whatever the loss function counted; for a single number, the micro-batches that reported it."""

    is_per_token: bool
    """Whether the loss function reported the count."""

    def plus(self, other: "Total") -> "Total":
        """The sum of both totals."""
        return Total(self.sum + other.sum, self.counted + other.counted, self.is_per_token and other.is_per_token)


def sum_and_count(name: str, value: Any, device: torch.device | str) -> tuple[torch.Tensor, bool]:
    """One micro-batch's metric as [sum, count].

    Args:
        name: Name of the metric, for the error.
        value: What the loss function reported.
        device: Device of the result.

    Returns:
        A tensor [2], float32, and whether the loss function reported the count.

    Raises:
        ValueError: The value has none of the forms above.
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
    """The elements of a tensor or number, flat, float32, on a device."""
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
    """Sum each metric over micro-batches and data-parallel ranks. Collective.

    Args:
        reported: What the loss function reported for each of this rank's micro-batches. Only the last pipeline stage
            has any.

    Returns:
        The totals by name, the same on every rank of a model-parallel group.

    Raises:
        ValueError: On all ranks, if a metric on any rank has a form that can't be summed.
    """
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return _totals(reported)
    shared: list[Any] = [None]
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        try:
            shared = [_totals(reported)]
        except ValueError as error:  # don't raise yet: the other stages wait for this one
            shared = [error]
    dist.broadcast_object_list(
        shared, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
    )
    if isinstance(shared[0], ValueError):
        raise shared[0]
    return shared[0]


def _totals(reported: list[dict[str, Any]]) -> dict[str, Total]:
    """The total of each metric over the ranks of this stage.

    Raises:
        ValueError: On all ranks of the stage, if a metric has a form that can't be summed.
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
    """For this rank's micro-batches, by name: [sum, count], and whether the loss function reported the count."""
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
    """The metrics of all data-parallel ranks, in the same order on each, and whether each is per token.

    Args:
        own: This rank's metrics.
        problem: What is wrong with them; None if nothing is.

    Raises:
        ValueError: On all ranks of the stage, if something is wrong on any of them.
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
    """Whether all ranks of a group have the same text. One small collective; gathering the texts takes several."""
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
    """The mean of each total; NaN if nothing was counted."""
    return {name: total.sum / total.counted if total.counted else math.nan for name, total in totals.items()}


def tokens_of(totals: Iterable[Total]) -> int | None:
    """Number of tokens in the loss; None if no loss function counts them."""
    counts = [total.counted for total in totals if total.is_per_token]
    return int(max(counts)) if counts else None
