# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Finish a configuration: the one place that writes one section's choices into another."""

import logging
import os

from megatron.bridge.training.config.container import ConfigContainer
from megatron.bridge.training.config.precedence import apply_mixed_precision, share_between_ddp_and_optimizer
from megatron.bridge.training.config.scheduler import SCHEDULE_LENGTHS
from megatron.bridge.utils.interpolation import resolve_interpolations

logger = logging.getLogger(__name__)


_VARIABLES_OF_CODE = ("LD_", "DYLD_", "PYTHON", "PATH")
"""What environment variables begin with that say which code a process loads; a configuration may be another's."""


def runtime_config_update(cfg: ConfigContainer) -> None:
    """Finish a configuration: the one place that writes one section's choices into another.

    Resolves `~` and `${...}` in all texts, sets the environment variables that aren't set, moves deprecated fields to
    their new place, writes mixed precision into model, optimizer and ddp, makes ddp and optimizer agree on what they
    share, lets attention keep its logits where they are logged, and validates. A second call changes nothing.

    What follows from it all is `cfg.derive()`. Scripts also find it as `cfg.data_parallel_size` and as the scheduler's
    `lr_decay_steps`, `lr_warmup_steps`, `wd_incr_steps` and `wsd_decay_steps`; nothing that is None for "derived" is
    filled in.

    Raises:
        ValueError: See `ConfigContainer.validate`.
    """
    resolve_interpolations(cfg)
    for name, value in cfg.env_vars.items():
        if name.startswith(_VARIABLES_OF_CODE):
            raise ValueError(f"env_vars.{name} would make processes load other code: set it where the run is started")
        if not isinstance(value, str | int | float):
            raise ValueError(f"env_vars.{name} is {value!r}: expected a text; names of variables have no dots")
        os.environ.setdefault(name, str(value))
    _move_deprecated_fields(cfg)
    apply_mixed_precision(cfg)
    share_between_ddp_and_optimizer(cfg)
    if cfg.logger.log_max_attention_logit:
        cfg.model.log_max_attention_logit = True  # Core's attention keeps it only then
    cfg.validate()
    derived = cfg.derive()
    cfg.data_parallel_size = derived.data_parallel_size
    for name in SCHEDULE_LENGTHS:
        setattr(cfg.scheduler, name, getattr(derived, name))


def _move_deprecated_fields(cfg: ConfigContainer) -> None:
    """Give eval_iters, eval_interval and skip_train on TrainingConfig to ValidationConfig, where they live now."""
    for name in ("eval_iters", "eval_interval", "skip_train"):
        value = getattr(cfg.train, name)
        if value is not None:
            logger.warning("train.%s=%s is deprecated: moved to validation.%s", name, value, name)
            setattr(cfg.validation, name, value)
            setattr(cfg.train, name, None)
