# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on the run: batch sizes, its length, and what ends it early."""

import signal
from dataclasses import dataclass, field

from megatron.bridge.training.config.fields import require_not_negative, require_positive
from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class TrainingConfig(BridgeSection):
    """How many samples a step takes, how many steps a run takes, and what ends it early."""

    _section = "train"

    micro_batch_size: int | None = None
    """Samples in one forward pass of one data-parallel rank. Must be set."""

    global_batch_size: int | None = None
    """Samples in one optimizer step over all ranks. None: micro_batch_size times the data-parallel size."""

    train_iters: int | None = None
    """Optimizer steps of the whole run, those of earlier sessions included. None: train_samples says it."""

    train_samples: int | None = None
    """Samples of the whole run; set this or train_iters. None: train_iters says it."""

    num_epochs: int | None = None
    """Passes over the training data, in place of the two above. Steps follow from the data when it has been read; the
    schedule counts in steps. What makes no whole global batch at the end of the last pass is left out. None: unset."""

    exit_interval: int | None = None
    """Save and stop after a step whose number this divides. None: don't."""

    exit_duration_in_mins: int | None = None
    """Save and stop after this many minutes. None: don't."""

    exit_signal_handler: bool = False
    """Save and stop when `exit_signal` arrives on any rank, and end with exit code 75."""

    exit_signal: signal.Signals = signal.SIGTERM
    """The signal that asks for a save and a stop (with exit_signal_handler)."""

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
            num_epochs=self.num_epochs,
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
        self._check_length()

    def _check_length(self) -> None:
        lengths = {name: getattr(self, name) for name in ("train_iters", "train_samples", "num_epochs")}
        found = [f"train.{name}={value}" for name, value in lengths.items() if value is not None]
        if not found:
            raise ValueError(
                "train.train_iters and train.train_samples are both unset: set one of them, or train.num_epochs"
            )
        if len(found) > 1:
            raise ValueError(
                f"{' and '.join(found)} are {'both' if len(found) == 2 else 'all'} set: "
                "a run's length is one or the other; set all but one of them to null"
            )
