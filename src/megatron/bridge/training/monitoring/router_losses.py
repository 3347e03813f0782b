# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The losses that experts' routers add to the one that is trained on: read where Core keeps them, averaged, shown.

Core adds up each router's loss over a step's micro-batches, layer by layer, and tells nobody. It does so in training
alone, and of layers that are recomputed once. Shapes: N losses in force, L layers of the whole model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import mpu

from megatron.bridge.utils.device import current_device

try:  # Core from 0.17
    from megatron.core.transformer.moe import moe_logging
except ImportError:
    moe_logging = None

LOAD_BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Kinds of `model.moe_router_load_balancing_type` that are losses, each with Core's name for what it gives."""

Z_LOSS = "z_loss"


class RouterLosses(NamedTuple):
    """Of one step, without their coefficients; empty where none is in force."""

    means: dict[str, float]
    """Over layers with experts, micro-batches and data-parallel ranks, by Core's name."""

    by_layer: dict[str, float]
    """With `model.moe_per_layer_logging`, each of these layers', as Megatron-LM names them: `moe/z_loss_layer_0`."""


def names_in_force(config: Any) -> list[str]:
    """Which losses a model's routers add to the one that is trained on.

    Args:
        config: Transformer configuration.
    """
    if not config.num_moe_experts:
        return []
    kinds, coefficients = _as_list(config.moe_router_load_balancing_type), _as_list(config.moe_aux_loss_coeff)
    pairs = zip(kinds, coefficients, strict=True)
    names = [LOAD_BALANCING[kind] for kind, coefficient in pairs if kind in LOAD_BALANCING and coefficient]
    return names + ([Z_LOSS] if config.moe_z_loss_coeff else [])


def is_router_loss(name: str) -> bool:
    """Whether a figure is one of these, or a layer's part of one."""
    return name in (*LOAD_BALANCING.values(), Z_LOSS) or name.startswith("moe/")


def forget_router_losses() -> None:
    """Drop what is kept, and with it its size: another model may follow in this process."""
    if moe_logging is not None:
        moe_logging.destroy_moe_metrics_tracker()
    else:
        _kept().clear()


def clear_router_losses() -> None:
    """Begin a step: nothing of an earlier forward pass counts in it."""
    for entry in _kept().values():
        _values(entry).zero_()


def read_router_losses(config: Any, *, num_micro_batches: int) -> RouterLosses:
    """What the routers added to the step that was just run forward and backward. Collective where any is in force.

    Args:
        config: Transformer configuration.
        num_micro_batches: Of the step, on each data-parallel rank.

    Returns:
        The same on every rank.
    """
    names = names_in_force(config)
    if not names:
        return RouterLosses({}, {})
    # Core's own reduction hangs on a stage without experts, needs an average that gloo hasn't got, and in 0.16 shows
    # one rank's z loss. A layer lies on one stage, and each rank there holds its part: one sum over all ranks will do.
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    sums = torch.zeros(len(names), num_layers, device=current_device())  # [N, L] float32
    kept = _kept()
    for row, name in enumerate(names):
        if name in kept:
            sums[row] = _values(kept[name])
    torch.distributed.all_reduce(sums)
    losses = _figures(dict(zip(names, sums.tolist(), strict=True)), num_micro_batches)
    return losses if config.moe_per_layer_logging else RouterLosses(losses.means, {})


def _figures(sums: dict[str, list[float]], num_micro_batches: int) -> RouterLosses:
    """From each loss's sums over micro-batches and ranks, by layer; a layer that added nothing has no router."""
    means: dict[str, float] = {}
    by_layer: dict[str, float] = {}
    for name, values in sums.items():
        scale = 1 / (num_micro_batches * _num_repeats(name))
        of_layers = {layer: value * scale for layer, value in enumerate(values) if value}
        if of_layers:
            means[name] = sum(of_layers.values()) / len(of_layers)
            by_layer |= {f"moe/{name}_layer_{layer}": value for layer, value in of_layers.items()}
    return RouterLosses(means, by_layer)


def _num_repeats(name: str) -> int:
    """How many ranks of a stage hold a whole loss, their own tokens' each; the others hold parts of one."""
    data_parallel_size = mpu.get_data_parallel_world_size()
    if name == LOAD_BALANCING["global_aux_loss"]:
        return 1
    if name == Z_LOSS:
        return data_parallel_size * mpu.get_tensor_and_context_parallel_world_size()
    return data_parallel_size


def _kept() -> dict[str, Any]:
    """Core's entries by name."""
    if moe_logging is not None:
        return moe_logging.get_moe_metrics_tracker().metrics
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    return get_moe_layer_wise_logging_tracker()


def _values(entry: Any) -> torch.Tensor:
    """[L] float32, this rank's sums."""
    return entry["values"] if isinstance(entry, dict) else entry.values


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
