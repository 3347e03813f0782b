# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sections on the run itself: batch sizes and length, evaluation, schedule.

Scripts import these classes from `megatron.bridge.training.config`. Checks on one section's own fields live in its
`finalize()`, which never changes a field; rules that look at several sections are in `config_checks.py`.
"""

import signal
from dataclasses import dataclass, field
from typing import Literal


def require_positive(section: str, **values: int | None) -> None:
    """Raise when a number that counts something is set and smaller than one."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{section}.{name} is {value}: it must be at least 1; set a positive number")


def require_not_negative(section: str, **values: float | None) -> None:
    """Raise when a number is set and negative."""
    for name, value in values.items():
        if value is not None and value < 0:
            raise ValueError(f"{section}.{name} is {value}: it can't be negative; set 0 or more")


@dataclass(kw_only=True)
class TrainingConfig:
    """How many samples a step takes, how many steps a run takes, and what ends it early."""

    micro_batch_size: int | None = None
    """Samples in one forward pass of one data-parallel rank. Must be set."""

    global_batch_size: int | None = None
    """Samples in one optimizer step over all ranks. None: micro_batch_size times the data-parallel size."""

    rampup_batch_size: list[int] | None = None
    """[start, increment, samples]: the global batch size grows. Not built yet. None: it is constant."""

    decrease_batch_size_if_needed: bool = False
    """Round the global batch size down to what micro batch times data-parallel size divides (with a ramp-up)."""

    empty_unused_memory_level: Literal[0, 1, 2] = 0
    """Return cached device memory each step: 0 never, 1 after the optimizer step, 2 before it too."""

    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Steps between checks that all data-parallel ranks hold equal weights. None: never."""

    train_sync_interval: int | None = None
    """Steps between synchronisations of host and device. None: never."""

    train_iters: int | None = None
    """Optimizer steps of the whole run, those of earlier sessions included. None: train_samples says it."""

    train_samples: int | None = None
    """Samples of the whole run; set this or train_iters. None: train_iters says it."""

    exit_interval: int | None = None
    """Save and stop after a step whose number this divides. None: don't."""

    exit_duration_in_mins: int | None = None
    """Save and stop after this many minutes. None: don't."""

    exit_signal_handler: bool = False
    """Save and stop when `exit_signal` arrives on any rank, and end with exit code 75."""

    exit_signal: signal.Signals = signal.SIGTERM
    """The signal that asks for a save and a stop (with exit_signal_handler)."""

    exit_signal_handler_for_dataloader: bool = False
    """Accepted from Megatron Bridge: data loader workers always live on at the exit signal."""

    manual_gc: bool = False
    """Collect Python garbage at fixed steps instead of whenever Python likes, so that ranks don't wait."""

    manual_gc_interval: int = 0
    """Steps between garbage collections with manual_gc. 0: only at the start, and as manual_gc_eval says."""

    manual_gc_eval: bool = True
    """With manual_gc: collect all garbage before an evaluation in between, and the youngest after it."""

    iterations_to_skip: list[int] = field(default_factory=list)
    """Steps whose samples are read and thrown away, by the numbers that the log shows: the first step is 1."""

    max_nonfinite_steps: int = 0
    """Steps in a row, whose loss or gradient is NaN or infinite, that are left out; one more stops the run.
    0: the first one does. FP16's loss scaling skips its steps whatever this says."""

    num_epochs: int | None = None
    """Passes over the training set. Not built yet: set train_iters or train_samples."""

    check_optimizer_step_success: bool = False
    """Stop when the optimizer skips a step. Not built yet."""

    skip_train: bool | None = None
    """Deprecated name of validation.skip_train. None: not set; a value here wins."""

    eval_iters: int | None = None
    """Deprecated name of validation.eval_iters. None: not set; a value here wins."""

    eval_interval: int | None = None
    """Deprecated name of validation.eval_interval. None: not set; a value here wins."""

    def required_micro_batch_size(self) -> int:
        """`micro_batch_size`.

        Raises:
            ValueError: It is not set.
        """
        if self.micro_batch_size is None:
            raise ValueError("train.micro_batch_size is not set: it is the samples of one forward pass; set it, e.g. 1")
        return self.micro_batch_size

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        require_positive(
            "train",
            micro_batch_size=self.required_micro_batch_size(),
            global_batch_size=self.global_batch_size,
            train_samples=self.train_samples,
            exit_interval=self.exit_interval,
            exit_duration_in_mins=self.exit_duration_in_mins,
            eval_interval=self.eval_interval,
        )
        require_not_negative(
            "train",
            train_iters=self.train_iters,
            manual_gc_interval=self.manual_gc_interval,
            max_nonfinite_steps=self.max_nonfinite_steps,
            eval_iters=self.eval_iters,
        )
        if wrong := [step for step in self.iterations_to_skip if step < 1]:
            raise ValueError(
                f"train.iterations_to_skip holds {wrong[0]}: expected numbers of steps as the log shows them, from 1 on"
            )
        if self.exit_signal in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(
                f"train.exit_signal={self.exit_signal.name}: no process can catch it; set SIGTERM, SIGINT or SIGUSR1"
            )
        if self.train_iters is None and self.train_samples is None:
            raise ValueError("train.train_iters and train.train_samples are both unset: set one of them")
        if self.train_iters is not None and self.train_samples is not None:
            raise ValueError(
                f"train.train_iters={self.train_iters} and train.train_samples={self.train_samples} are both set: "
                "a run's length is one or the other; set one of them to null"
            )


@dataclass(kw_only=True)
class ValidationConfig:
    """When the model is evaluated, and on how much."""

    eval_iters: int | None = 100
    """Global batches of one evaluation. None: the whole validation set. 0: no evaluation."""

    eval_interval: int | None = None
    """Steps between evaluations. None: only at the end of the run."""

    eval_at_start: bool = False
    """Evaluate before the first step too, so that a run shows what its training changed."""

    start_eval_at_iter: int | None = None
    """First step at which an evaluation may happen. None: from the start."""

    eval_global_batch_size: int | None = None
    """Samples of one evaluation step. None: train.global_batch_size."""

    eval_micro_batch_size: int | None = None
    """Samples of one forward pass in evaluation. None: train.micro_batch_size."""

    skip_train: bool = False
    """Evaluate and stop, without training."""

    test_mode: bool = False
    """Reserved by Megatron-LM for its own tests."""

    full_validation: bool = False
    """Evaluate on the whole validation set each time."""

    multiple_validation_sets: bool = False
    """Evaluate on several validation sets, one by one. Not built yet."""

    validation_set_names: list[str] | None = None
    """Names of the validation sets in the logs. Not built yet. None: no names."""

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        require_not_negative("validation", eval_iters=self.eval_iters, start_eval_at_iter=self.start_eval_at_iter)
        require_positive(
            "validation",
            eval_interval=self.eval_interval,
            eval_global_batch_size=self.eval_global_batch_size,
            eval_micro_batch_size=self.eval_micro_batch_size,
        )


@dataclass(kw_only=True)
class SchedulerConfig:
    """How learning rate and weight decay move over a run."""

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

    max_steps: int | None = None
    """Steps that the schedule may count. None: as many as the run takes. Not built yet."""

    lr_decay_steps: int | None = field(init=False, default=None)
    """Filled by runtime_config_update: decay length, in samples (the unit in which Core's scheduler counts)."""

    lr_warmup_steps: int | None = field(init=False, default=None)
    """Filled by runtime_config_update: warm-up length, in samples."""

    wd_incr_steps: int | None = field(init=False, default=None)
    """Filled by runtime_config_update: length of the weight decay's change, in samples."""

    wsd_decay_steps: int | None = field(init=False, default=None)
    """Filled by runtime_config_update: length of WSD's falling part, in samples. None: not WSD."""

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
