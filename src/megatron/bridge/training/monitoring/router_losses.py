# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Report the losses that the experts' routers add to the trained loss.

Core sums each router's loss over the micro-batches of a step, layer by layer, but doesn't report it. It does so only in
training; a layer that is recomputed counts once. Shapes: N losses in use, L layers of the whole model.
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
"""Values of `model.moe_router_load_balancing_type` that are losses, with Core's name of each loss."""

Z_LOSS = "z_loss"


class RouterLosses(NamedTuple):
    """Router losses of one step, without their coefficients; empty if none is in use."""

    means: dict[str, float]
    """Means over layers with experts, micro-batches and data-parallel ranks, by Core's name."""

    by_layer: dict[str, float]
    """With `model.moe_per_layer_logging`, the same for each layer, under Megatron-LM's names: `moe/z_loss_layer_0`."""


def names_in_force(config: Any) -> list[str]:
    """The names of the losses that a model's routers add to the trained loss.

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
    """Whether a metric is a router loss, of the model or of one layer."""
    return name in (*LOAD_BALANCING.values(), Z_LOSS) or name.startswith("moe/")


def forget_router_losses() -> None:
    """Drop Core's record of router losses, and with it its size: the next model in this process may have another."""
    if moe_logging is not None:
        moe_logging.destroy_moe_metrics_tracker()
    else:
        _kept().clear()


def clear_router_losses() -> None:
    """Reset the sums at the start of a step, so that no earlier forward pass counts."""
    for entry in _kept().values():
        _values(entry).zero_()


def read_router_losses(config: Any, *, num_micro_batches: int) -> RouterLosses:
    """The router losses of the step that was just run forward and backward. Collective if any is in use.

    Args:
        config: Transformer configuration.
        num_micro_batches: Micro-batches of the step, on each data-parallel rank.

    Returns:
        The losses, the same on every rank.
    """
    names = names_in_force(config)
    if not names:
        return RouterLosses({}, {})
    # Core's own reduction hangs on a stage without experts, needs an average that gloo lacks, and in 0.16 reports one
    # rank's z loss. Each layer is on one stage, and each rank there has its part of it, so one sum over all ranks will
    # do.
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
    """Means, from each loss's sums over micro-batches and ranks, by layer. A layer with sum 0 has no router."""
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
    """How many ranks of a stage have a complete loss of their own tokens; the others have parts of one."""
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
