# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA+: a higher learning rate for B than for A (Hayou et al. 2024, arXiv 2402.12354)."""

from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamKey

B_MATRICES = "*.linear_out.weight"
"""The names of all B, those beside parts of fused layers included."""


def is_b_matrix(name: str) -> bool:
    """Whether a parameter is the B of an adapter, by its name in the model."""
    return ".adapter." in name and name.endswith(B_MATRICES[1:])


def get_lora_plus_config_overrides(
    optimizer_config: OptimizerConfig, lr_ratio: float = 16.0
) -> dict[ParamKey, dict[str, Any]]:
    """Core's overrides that give each B `lr_ratio` times the learning rate of the other parameters.

    Warm-up and decay are those of the schedule; `scheduler.lr_warmup_init` isn't multiplied. Add them to the overrides
    of your own `OptimizerConfigOverrideProvider`, or take `LoRAPlusOverrideProvider`, which does.

    Args:
        optimizer_config: Its `lr` and `min_lr` are A's.
        lr_ratio: The paper's lambda, for which it recommends 16.

    Raises:
        ValueError: The ratio or the learning rate isn't above 0.
    """
    if not lr_ratio > 0:
        raise ValueError(f"LoRA+: lr_ratio={lr_ratio!r}: expected a number above 0, such as 16")
    if not optimizer_config.lr:
        raise ValueError(f"LoRA+: optimizer.lr={optimizer_config.lr!r}: expected the learning rate of A, above 0")
    # Up to 0.16.1 Core matches a checkpoint's groups by this flag, and not by their rates.
    override: dict[str, Any] = {"max_lr": optimizer_config.lr * lr_ratio, "is_decoupled_lr": True}
    if optimizer_config.min_lr is not None:
        override["min_lr"] = optimizer_config.min_lr * lr_ratio
    return {ParamKey(name=B_MATRICES): override}
