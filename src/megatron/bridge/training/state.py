# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run knows about itself: the part that a checkpoint restores, and the objects of this process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from megatron.bridge.training.hang_watchdog import HangWatchdog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from megatron.bridge.training.background_save import BackgroundSave
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.config_derived import DerivedConfig
    from megatron.bridge.training.preemption import ExitSignal

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Progress of a run: plain numbers, saved with every checkpoint as `train_state.pt`."""

    step: int = 0
    """Optimizer steps taken."""

    consumed_train_samples: int = 0
    """Training samples taken from the data, skipped steps included."""

    skipped_train_samples: int = 0
    """Samples of steps that were skipped."""

    consumed_valid_samples: int = 0
    """Validation samples evaluated."""

    floating_point_operations_so_far: float = 0.0
    """Floating point operations of all steps, by formula, taking each data-parallel rank's share for equal."""

    do_train: bool = False
    """Whether the run has training data."""

    do_valid: bool = False
    """Whether the run has validation data."""

    do_test: bool = False
    """Whether the run has test data."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The fields as tensors: int64 counts, bool flags, operations as float64 (a resume must add up alike)."""
        dtypes = {"floating_point_operations_so_far": torch.float64, "do_train": torch.bool}
        dtypes |= {"do_valid": torch.bool, "do_test": torch.bool}
        return {
            item.name: torch.tensor(getattr(self, item.name), dtype=dtypes.get(item.name, torch.int64), device="cpu")
            for item in fields(self)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the fields from tensors or numbers.

        Raises:
            ValueError: A field is missing, or no number.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"the checkpoint's train state is a {type(state_dict).__name__}: expected named numbers")
        for item in fields(self):
            if item.name not in state_dict:
                found = ", ".join(str(name)[:40] for name in state_dict)
                raise ValueError(f"the checkpoint's train state lacks {item.name!r}: found {found[:400] or 'nothing'}")
            number: Any = type(item.default)
            try:
                setattr(self, item.name, number(state_dict[item.name]))
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                kind = type(state_dict[item.name]).__name__
                raise ValueError(
                    f"the checkpoint's train state has a {kind} as {item.name!r}: expected one number"
                ) from error


@dataclass
class GlobalState:
    """The objects that belong to one run in this process."""

    cfg: ConfigContainer
    train_state: TrainState = field(default_factory=TrainState)
    tokenizer: Any = None
    _derived: DerivedConfig | None = field(default=None, repr=False)
    data_report: dict[str, str] = field(default_factory=dict)
    """What became of the data, by split, in words."""

    background_save: BackgroundSave | None = field(default=None, repr=False)
    """The save that is being written while training continues; None: there is none."""

    generation_config: dict[str, Any] | None = None
    """What is saved beside the tokenizer as `generation_config.json`, on rank 0; None: nothing."""

    exit_signal: ExitSignal | None = field(default=None, repr=False)
    """The signal that stops the run; None: none is caught."""

    evaluated_step: int | None = None
    """The step after which this start last evaluated the validation set; None: it hasn't yet."""

    num_nonfinite_steps: int = 0
    """The steps in a row, up to the last one, that were left out because a loss or a gradient was not finite."""

    watchdog: HangWatchdog = field(default_factory=HangWatchdog, repr=False)
    """Ends this rank when it hangs, while it is `watched`."""

    wandb_logger: Any = field(default=None, repr=False)
    """The run in Weights & Biases, on rank 0; None elsewhere or without it."""

    mlflow_logger: Any = field(default=None, repr=False)
    """The module mlflow with an active run, on rank 0; None elsewhere or without it."""

    _tensorboard: SummaryWriter | None = field(default=None, repr=False)

    @property
    def derived(self) -> DerivedConfig:
        """What `setup` worked out from the configuration.

        Raises:
            RuntimeError: It hasn't yet.
        """
        if self._derived is None:
            raise RuntimeError("the run isn't set up: `setup` works out what follows from its configuration")
        return self._derived

    @derived.setter
    def derived(self, derived: DerivedConfig) -> None:
        self._derived = derived

    @property
    def tensorboard_logger(self) -> SummaryWriter | None:
        """TensorBoard's writer, made on first use on rank 0; None elsewhere or without it."""
        from megatron.bridge.utils.distributed import is_rank_0

        if self._tensorboard is None and self.cfg.logger.tensorboard_dir and is_rank_0():
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                log_dir=self.cfg.logger.tensorboard_dir, max_queue=self.cfg.logger.tensorboard_queue_size
            )
        return self._tensorboard

    def close(self) -> None:
        """Close what was opened; a save that is still being written is given up."""
        if self.background_save is not None:
            self.background_save.abandon()
            self.background_save = None
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard is not None:
            try:
                tensorboard.close()
            except OSError as error:
                logger.warning("TensorBoard's file in %s is cut short: %s", self.cfg.logger.tensorboard_dir, error)
