# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public names that choose how tokens reach their experts: with the kernels of DeepEP, or with some tokens dropped.

Public as `megatron.bridge.training.flex_dispatcher_backend`, `training.deepep` and `training.utils.moe_token_drop`.
"""

from typing import Any

__all__ = ["apply_deepep", "apply_flex_dispatcher_backend", "apply_moe_token_drop"]


def apply_flex_dispatcher_backend(model_config: Any, moe_flex_dispatcher_backend: str | None = None) -> None:
    """Leave the dispatcher as it is where no backend is asked for.

    Args:
        model_config: The provider.
        moe_flex_dispatcher_backend: None; a model without experts takes any.

    Raises:
        NotImplementedError: A backend is asked for.
    """
    if moe_flex_dispatcher_backend is None or not model_config.num_moe_experts:
        return
    raise NotImplementedError(
        f"moe_flex_dispatcher_backend={moe_flex_dispatcher_backend!r}: its kernels have never been run here; leave it "
        "at None, and choose model.moe_token_dispatcher_type=alltoall or allgather"
    )


def apply_deepep(model_config: Any) -> None:
    """As `apply_flex_dispatcher_backend` with `deepep`: nothing for a model without experts, refused for others."""
    apply_flex_dispatcher_backend(model_config, "deepep")


def apply_moe_token_drop(
    model_config: Any, moe_expert_capacity_factor: float = 1.0, moe_pad_expert_input_to_capacity: bool = True
) -> None:
    """Give each expert room for so many tokens, and drop those beyond it.

    Args:
        model_config: The provider; changed.
        moe_expert_capacity_factor: An expert's room, times the tokens that it gets if all get the same number; 0 or
            less: any number, and none is dropped.
        moe_pad_expert_input_to_capacity: Whether an expert that gets fewer computes on padding beside them.

    Raises:
        ValueError: The model's dispatcher drops no tokens, or there is more room to pad than there are tokens.
    """
    if moe_expert_capacity_factor <= 0:
        model_config.moe_expert_capacity_factor, model_config.moe_pad_expert_input_to_capacity = None, False
        return
    if model_config.moe_token_dispatcher_type != "alltoall":
        raise ValueError(
            f"model.moe_token_dispatcher_type={model_config.moe_token_dispatcher_type!r} drops no tokens: set it to "
            "'alltoall'"
        )
    most = model_config.num_moe_experts / model_config.moe_router_topk
    if moe_pad_expert_input_to_capacity and moe_expert_capacity_factor > most:
        raise ValueError(
            f"moe_expert_capacity_factor={moe_expert_capacity_factor} gives each expert room for more than all tokens, "
            f"which Core can't pad: lower it to {most:g} or less"
        )
    model_config.moe_expert_capacity_factor = moe_expert_capacity_factor
    model_config.moe_pad_expert_input_to_capacity = moe_pad_expert_input_to_capacity
