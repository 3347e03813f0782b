# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on learning rate and weight decay over time."""

from dataclasses import dataclass, field
from typing import Literal

from megatron.bridge.training.config.fields import require_not_negative, require_positive
from megatron.bridge.utils.section import BridgeSection

SCHEDULE_LENGTHS = ("lr_decay_steps", "lr_warmup_steps", "wd_incr_steps", "wsd_decay_steps")
"""Fields of `DerivedConfig` that validate() shows here for scripts; the run reads `DerivedConfig`."""


@dataclass(kw_only=True)
class SchedulerConfig(BridgeSection):
    """How learning rate and weight decay move over a run."""

    _section = "scheduler"

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the learning rate from optimizer.lr down to optimizer.min_lr."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last, falling part of a WSD (warm-up, stable, decay) schedule."""

    lr_decay_iters: int | None = None
    """Steps after which the learning rate is at its minimum. None: train.train_iters."""

    lr_decay_samples: int | None = None
    """The same in samples, for a run whose length is train.train_samples. None: train.train_samples."""

    lr_wsd_decay_iters: int | None = None
    """Steps of the falling part of a WSD schedule. None: not WSD, or counted in samples."""

    lr_wsd_decay_samples: int | None = None
    """Samples of the falling part of a WSD schedule. None: not WSD, or counted in steps."""

    lr_warmup_fraction: float | None = None
    """Warm-up as a part, 0 to 1, of the decay steps. None: lr_warmup_iters or lr_warmup_samples."""

    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises from lr_warmup_init to optimizer.lr."""

    lr_warmup_samples: int = 0
    """The same in samples, for a run whose length is train.train_samples."""

    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""

    override_opt_param_scheduler: bool = False
    """After a resume, take the schedule from this configuration instead of the checkpoint."""

    use_checkpoint_opt_param_scheduler: bool = False
    """After a resume, take the schedule from the checkpoint and ignore this configuration."""

    start_weight_decay: float | None = None
    """Weight decay at the first step. None: optimizer.weight_decay."""

    end_weight_decay: float | None = None
    """Weight decay at the last step. None: optimizer.weight_decay."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the way from start_weight_decay to end_weight_decay."""

    no_weight_decay_cond_type: Literal["qwen3_next"] | None = None
    """Which parameters get no weight decay. None: biases and one-dimensional parameters."""

    lr_decay_steps: int | None = field(init=False, default=None)
    """Shown once validated: decay length, in samples (the unit in which Core's scheduler counts)."""

    lr_warmup_steps: int | None = field(init=False, default=None)
    """Shown once validated: warm-up length, in samples."""

    wd_incr_steps: int | None = field(init=False, default=None)
    """Shown once validated: length of the weight decay's change, in samples."""

    wsd_decay_steps: int | None = field(init=False, default=None)
    """Shown once validated: length of WSD's falling part, in samples. None: not WSD."""

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        require_positive(
            "scheduler",
            lr_decay_iters=self.lr_decay_iters,
            lr_decay_samples=self.lr_decay_samples,
            lr_wsd_decay_iters=self.lr_wsd_decay_iters,
            lr_wsd_decay_samples=self.lr_wsd_decay_samples,
        )
        require_not_negative(
            "scheduler",
            lr_warmup_iters=self.lr_warmup_iters,
            lr_warmup_samples=self.lr_warmup_samples,
            lr_warmup_init=self.lr_warmup_init,
            start_weight_decay=self.start_weight_decay,
            end_weight_decay=self.end_weight_decay,
        )
        if self.lr_warmup_fraction is not None:
            if not 0.0 <= self.lr_warmup_fraction < 1.0:
                raise ValueError(
                    f"scheduler.lr_warmup_fraction={self.lr_warmup_fraction}: it is a part of the decay steps; "
                    "set 0 or more and less than 1"
                )
            if self.lr_warmup_iters or self.lr_warmup_samples:
                raise ValueError(
                    "scheduler.lr_warmup_fraction is set beside scheduler.lr_warmup_iters or lr_warmup_samples: "
                    "the warm-up has one length; keep one of them"
                )
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise ValueError(
                "scheduler.override_opt_param_scheduler and scheduler.use_checkpoint_opt_param_scheduler are both "
                "true: the schedule comes from one place; set one of them to false"
            )
