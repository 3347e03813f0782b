# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Finish a configuration: the one place that writes one section's choices into another."""

import logging
import os
from dataclasses import replace

from megatron.bridge.training.config.container import ConfigContainer
from megatron.bridge.training.config.derived import DerivedConfig, derive, with_known_length
from megatron.bridge.training.config.precedence import apply_mixed_precision, share_between_ddp_and_optimizer
from megatron.bridge.training.config.rules.schedule import check_schedule_fits_the_run
from megatron.bridge.utils.distributed import world_size
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
    apply_environment_variables(cfg)
    _move_deprecated_fields(cfg)
    apply_mixed_precision(cfg)
    share_between_ddp_and_optimizer(cfg)
    if cfg.logger.log_max_attention_logit:
        cfg.model.log_max_attention_logit = True  # Core's attention keeps it only then
    cfg.validate()


def apply_environment_variables(cfg: ConfigContainer) -> None:
    """Set the variables of `env_vars` that this process hasn't set.

    Raises:
        ValueError: One would make processes load other code, or isn't a text.
    """
    for name, value in cfg.env_vars.items():
        if name.startswith(_VARIABLES_OF_CODE):
            raise ValueError(f"env_vars.{name} would make processes load other code: set it where the run is started")
        if not isinstance(value, str | int | float):
            raise ValueError(f"env_vars.{name} is {value!r}: expected a text; names of variables have no dots")
        os.environ.setdefault(name, str(value))


def derive_from_data(cfg: ConfigContainer, *, train_samples: int | None, unit: str = "samples") -> DerivedConfig:
    """What follows from a configuration when the data is known: with `train.num_epochs`, the length of the run.

    Args:
        cfg: A configuration that `runtime_config_update` has checked.
        train_samples: Samples in the training data. None: there is none.
        unit: What the log calls them.

    Raises:
        ValueError: The epochs make no step, or the schedule doesn't fit them.
    """
    epochs, ranks = cfg.train.num_epochs, world_size()
    if epochs is None:
        return cfg.derive(ranks)
    if train_samples is None:
        raise ValueError(f"train.num_epochs={epochs} without training data: set train.train_iters instead")
    known = with_known_length(cfg, samples_per_epoch=train_samples, world_size=ranks)
    derived = derive(known, ranks)
    if derived.train_iters < 1:
        raise ValueError(
            f"train.num_epochs={epochs} over {train_samples} {unit}: fewer than one global batch "
            f"(train.global_batch_size={derived.global_batch_size}): add samples or lower train.global_batch_size"
        )
    check_schedule_fits_the_run(known, ranks)
    cfg.show(derived)
    left = epochs * train_samples - derived.train_samples
    logger.info(
        "train.num_epochs=%d over %d %s: %d steps of %d%s", epochs, train_samples, unit, derived.train_iters,
        derived.global_batch_size, f"; the last {left} make no whole global batch and are left out" if left else "",
    )  # fmt: skip
    return derived


def count_steps_left(
    cfg: ConfigContainer, derived: DerivedConfig, *, step: int, consumed_samples: int, samples_per_epoch: int | None
) -> DerivedConfig:
    """The same where steps were taken: those of a run whose length is in samples or epochs follow from what is left.

    Args:
        cfg: The run's configuration.
        derived: As `derive_from_data` returns.
        step: Steps that were taken, perhaps with another global batch.
        consumed_samples: Samples that they took.
        samples_per_epoch: Samples in the training data. None: there is none.
    """
    train = cfg.train
    if train.train_iters is not None or step == 0:
        return derived
    total = train.train_samples if train.num_epochs is None else train.num_epochs * (samples_per_epoch or 0)
    last_step = step + max(0, (total or 0) - consumed_samples) // derived.global_batch_size
    if last_step != derived.train_iters:
        logger.info(
            "the first %d steps took %d samples: the other %d make %d steps of %d", step, consumed_samples,
            max(0, (total or 0) - consumed_samples), last_step - step, derived.global_batch_size,
        )  # fmt: skip
    return replace(derived, train_iters=last_step)


def _move_deprecated_fields(cfg: ConfigContainer) -> None:
    """Give eval_iters, eval_interval and skip_train on TrainingConfig to ValidationConfig, where they live now."""
    for name in ("eval_iters", "eval_interval", "skip_train"):
        value = getattr(cfg.train, name)
        if value is not None:
            logger.warning("train.%s=%s is deprecated: moved to validation.%s", name, value, name)
            setattr(cfg.validation, name, value)
            setattr(cfg.train, name, None)
