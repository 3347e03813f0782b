# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where one section writes into another: what the user set there counts, or is refused; it is never dropped.

`mixed_precision` writes number formats into model, optimizer and ddp; ddp and optimizer share a few fields.
"""

import logging
from typing import Any

from megatron.bridge.training.config.mixed_precision import (
    get_mixed_precision_config,
    is_mixed_precision,
    name_of_preset,
)
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.utils.set_fields import forget_set_fields, set_fields, writes_that_nobody_set

logger = logging.getLogger(__name__)

_FORMATS = (
    "fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp8 fp8_recipe fp8_param fp8_param_gather "
    "reuse_grad_buf_for_mxfp8_param_ag fp4 fp4_recipe"
).split()
"""Written together: one that differs would leave sections that don't fit each other."""

_SHARED = ("use_distributed_optimizer", "overlap_param_gather", "reuse_grad_buf_for_mxfp8_param_ag")
"""Fields that ddp and optimizer both have, and that Core wants equal."""


def forget_what_agrees(cfg: RunSections) -> None:
    """Fields that say the same as the section that writes them were not set against it: they follow it from now on."""
    if is_mixed_precision(cfg.mixed_precision):
        written = get_mixed_precision_config(cfg.mixed_precision).written_values()
        for section in (cfg.model, cfg.optimizer, cfg.ddp):
            agreeing = [name for name, value in written.items() if getattr(section, name, ...) == value]
            forget_set_fields(section, agreeing)
    for name in _SHARED:
        if getattr(cfg.ddp, name) == getattr(cfg.optimizer, name):
            forget_set_fields(cfg.ddp, [name])
            forget_set_fields(cfg.optimizer, [name])


def apply_mixed_precision(cfg: RunSections) -> None:
    """Resolve `mixed_precision` and write it into model, optimizer and ddp; what was set there goes into it first.

    Raises:
        ValueError: A section's number format, or a value set in both places, contradicts it.
    """
    if cfg.mixed_precision is None:
        return
    resolved = get_mixed_precision_config(cfg.mixed_precision)
    kept = {}
    for option, name, value in _set_otherwise(cfg, resolved.written_values()):
        source = resolved.source_of(name)
        if name in _FORMATS or source in set_fields(resolved):
            raise ValueError(_contradiction(option, value, source, resolved))
        logger.info("%s=%s is kept, as it was set; mixed_precision says %s", option, value, getattr(resolved, source))
        kept[source] = value
    if kept:
        resolved = resolved.with_values(**kept)
    cfg.mixed_precision = resolved
    with writes_that_nobody_set(cfg.model, cfg.optimizer, cfg.ddp):
        resolved.setup(cfg.model, cfg.optimizer, cfg.ddp)


def _set_otherwise(cfg: RunSections, written: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Option, field and value of what was set in a section and differs from what would be written there."""
    return [
        (f"{section}.{name}", name, getattr(getattr(cfg, section), name))
        for section in ("model", "optimizer", "ddp")
        for name, value in written.items()
        if name in set_fields(getattr(cfg, section)) and getattr(getattr(cfg, section), name) != value
    ]


def _contradiction(option: str, value: Any, source: str, resolved: Any) -> str:
    preset = name_of_preset(resolved)
    says = f"mixed_precision={preset}" if preset else "mixed_precision"
    own = f"{says}, whose {source} is {getattr(resolved, source)}"
    way_out = "choose another mixed_precision" if source in _FORMATS else f"set mixed_precision.{source} alone"
    return (
        f"{option}={value} contradicts {own}: leave {option} out, {way_out}, or set mixed_precision=null and all "
        "formats in model, optimizer and ddp"
    )


def share_between_ddp_and_optimizer(cfg: RunSections) -> None:
    """Make ddp and optimizer equal in the fields that both have; setting one of the two is enough.

    Raises:
        ValueError: Both were set, and differ.
    """
    for name in _SHARED:
        ddp, optimizer = getattr(cfg.ddp, name), getattr(cfg.optimizer, name)
        owners = [section for section in (cfg.ddp, cfg.optimizer) if name in set_fields(section)]
        if len(owners) == 2 and ddp != optimizer:
            raise ValueError(
                f"ddp.{name}={ddp} and optimizer.{name}={optimizer} are both set, and are one choice: set both alike"
            )
        value = getattr(owners[0], name) if len(owners) == 1 else ddp or optimizer
        with writes_that_nobody_set(cfg.ddp, cfg.optimizer):
            setattr(cfg.ddp, name, value)
            setattr(cfg.optimizer, name, value)
