# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of what makes a run repeat itself on GPUs, at the price of speed."""

from megatron.bridge.training.config import ConfigContainer

__all__ = ["DETERMINISTIC_ENV_VARS", "apply_determinism_overrides"]

DETERMINISTIC_ENV_VARS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
"""For cuBLAS, NCCL and Transformer Engine; they read them when they start."""


def apply_determinism_overrides(config: ConfigContainer) -> ConfigContainer:
    """Let kernels and collectives add in one order, so that a repeated run gives the same bits on the same GPUs.

    Variables that are set outside have the last word, as always with `env_vars`. Without a GPU runs repeat anyway.

    Args:
        config: Changed: `model.deterministic_mode`, `model.cross_entropy_loss_fusion`, `env_vars`.

    Returns:
        The same configuration.
    """
    config.model.deterministic_mode = True
    config.model.cross_entropy_loss_fusion = False
    config.env_vars = {**DETERMINISTIC_ENV_VARS, **config.env_vars}
    return config
