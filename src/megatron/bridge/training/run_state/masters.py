# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Whether the FP32 masters on the device are those of the model's weights: an optimizer without offload."""

from collections.abc import Iterator
from typing import Any

import torch

from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers


@torch.no_grad()
def check_masters_on_device(optimizer: Any, model: list[Any]) -> int:
    """Compare every master with this rank's part of its weight. Offloaded optimizers have a check of their own.

    Args:
        optimizer: A Megatron optimizer of any kind, or None.
        model: This rank's chunks, for the names of weights.

    Returns:
        The number of masters compared.

    Raises:
        RuntimeError: A master doesn't round to its weight: a step would write it over what was loaded.
    """
    compared = 0
    for param, weight, master in _masters(optimizer):
        compared += 1
        if not torch.equal(master.to(weight.dtype), weight):
            name = next((name for chunk in model for name, one in chunk.named_parameters() if one is param), "a weight")
            index = int((master.to(weight.dtype) != weight).flatten().nonzero()[0])
            found, expected = float(master.flatten()[index]), float(weight.flatten()[index])
            raise RuntimeError(
                f"the optimizer's master of {name} is not the loaded weight ({found:g}, not {expected:g}): the next "
                "step would undo the load; restore the optimizer's state, or call optimizer.reload_model_params() "
                "after the weights are loaded"
            )
    return compared


def _masters(optimizer: Any) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Each 16-bit parameter of this rank, its part that the optimizer steps on, and the master of that part."""
    hybrids = find_hybrid_optimizers(optimizer)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part is None or part in hybrids:
            continue
        params = _flat(part, "model_float16_groups") or _flat(part, "float16_groups")
        weights = _flat(part, "shard_float16_groups") or _flat(part, "float16_groups")
        masters = _flat(part, "shard_fp32_from_float16_groups") or _flat(part, "fp32_from_float16_groups")
        for param, weight, master in zip(params, weights, masters, strict=True):
            if master is not None:  # None: a precision-aware optimizer keeps it itself
                yield param, weight, master


def _flat(part: Any, name: str) -> list[Any]:
    return [one for group in getattr(part, name, None) or () for one in group]
