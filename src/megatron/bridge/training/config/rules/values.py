# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The rules on single values that no section looks at itself: numbers that are none, empty paths, parts above 1."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megatron.bridge.training.config.sections import RunSections


def check_numbers_are_finite(cfg: RunSections, world_size: int) -> None:
    """No option is NaN or infinite: comparisons with NaN are false, so most checks and uses would let it pass."""
    for option, value in _options(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{option}={value}: expected a finite number; change it, or set null or 0 to switch it off"
            )


def check_paths_are_not_empty(cfg: RunSections, world_size: int) -> None:
    """An empty text, as `checkpoint.save=$NOT_SET` is in a shell, doesn't mean that nothing is saved."""
    for option, value in _options(cfg):
        is_one = option.startswith(("checkpoint.", "logger.")) or option == "dataset.path_to_cache"
        if is_one and isinstance(value, str) and not value.strip():
            raise ValueError(
                f"{option} is empty: set a text, or null to leave it unset (is a shell's variable not set?)"
            )


def check_optimizer_numbers_are_in_range(cfg: RunSections, world_size: int) -> None:
    """What Core compares with 0 and otherwise ignores, and what Adam can't divide or average with."""
    optimizer = cfg.optimizer
    if optimizer.clip_grad < 0:
        raise ValueError(f"optimizer.clip_grad is {optimizer.clip_grad}: set 0 to clip nothing, or a norm above 0")
    for name in ("adam_beta1", "adam_beta2", "sgd_momentum"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise ValueError(f"optimizer.{name} is {getattr(optimizer, name)}: expected 0 or more and less than 1")
    if optimizer.adam_eps < 0:
        raise ValueError(f"optimizer.adam_eps is {optimizer.adam_eps}: it can't be negative; set 0 or more")


def check_router_losses_have_weights(cfg: RunSections, world_size: int) -> None:
    """Each kind of router loss has a coefficient that is not negative, and there are routers."""
    model = cfg.model
    kinds, weights = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    if isinstance(kinds, list) != isinstance(weights, list) or (isinstance(kinds, list) and len(kinds) != len(weights)):
        raise ValueError(
            f"model.moe_aux_loss_coeff={weights} with model.moe_router_load_balancing_type={kinds}: expected one "
            "coefficient for each kind; make both a list of the same length, or neither"
        )
    by_option = {"moe_z_loss_coeff": model.moe_z_loss_coeff or 0.0}
    by_option |= {"moe_aux_loss_coeff": min(weights, default=0.0) if isinstance(weights, list) else weights}
    for name, smallest in by_option.items():
        if smallest < 0:
            raise ValueError(f"model.{name}={getattr(model, name)}: it can't be negative; set 0 or more")
        is_set = getattr(model, name) != type(model).__dataclass_fields__[name].default
        if is_set and smallest and not model.num_moe_experts:
            raise ValueError(
                f"model.{name}={getattr(model, name)} in a model without experts, which has no routers: leave it "
                "unset, or set model.num_moe_experts"
            )


def check_adapters_leave_router_biases(cfg: RunSections, world_size: int) -> None:
    """Adapters are saved without the model under them, so what a step did to its routers would be lost."""
    model = cfg.model
    moves = model.moe_router_enable_expert_bias and model.moe_router_bias_update_rate
    if moves and cfg.peft is not None:
        raise ValueError(
            f"model.moe_router_bias_update_rate={model.moe_router_bias_update_rate} with adapters (peft): it would "
            "change routers that are saved nowhere; set it to 0"
        )


def check_latent_attention_has_its_sizes(cfg: RunSections, world_size: int) -> None:
    """Latent attention is that of a provider which has its sizes."""
    if cfg.model.multi_latent_attention and not hasattr(cfg.model, "kv_lora_rank"):
        raise ValueError(
            f"model.multi_latent_attention=True in a {type(cfg.model).__name__}, which has no sizes for it: take a "
            "DeepSeekV3ModelProvider or a DeepSeekV2ModelProvider, or set it to False"
        )


def _options(cfg: RunSections) -> Iterator[tuple[str, Any]]:
    """Each option and what it holds, of a list each item; not its default, such as Core's thresholds of infinity."""
    for section in (field.name for field in dataclasses.fields(cfg)):
        values = getattr(cfg, section)
        if not dataclasses.is_dataclass(values) or isinstance(values, type):
            continue
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if value == field.default:
                continue
            for item in value if isinstance(value, list | tuple) else (value,):
                yield f"{section}.{field.name}", item


VALUE_RULES = (
    check_numbers_are_finite,
    check_paths_are_not_empty,
    check_optimizer_numbers_are_in_range,
    check_router_losses_have_weights,
    check_adapters_leave_router_biases,
    check_latent_attention_has_its_sizes,
)
