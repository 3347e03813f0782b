# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`GlobalState`: the state of a run, both what a checkpoint restores and the objects of this process."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.core.timers import Timers
from megatron.core.utils import StragglerDetector

from megatron.bridge.training.config import ConfigContainer, DerivedConfig
from megatron.bridge.training.monitoring.hang_watchdog import HangWatchdog
from megatron.bridge.training.monitoring.preemption import ExitSignal
from megatron.bridge.training.run_state.background import BackgroundSave
from megatron.bridge.training.run_state.train_state import TrainState
from megatron.bridge.utils.distributed import is_rank_0

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["GlobalState", "TrainState"]

logger = logging.getLogger(__name__)


@dataclass
class GlobalState:
    """The objects that belong to one run in this process."""

    cfg: ConfigContainer = None  # type: ignore[assignment]  # a script may set it once the state is made
    train_state: TrainState = field(default_factory=TrainState)
    tokenizer: Any = None
    _derived: DerivedConfig | None = field(default=None, repr=False)
    data_report: dict[str, str] = field(default_factory=dict)
    """Report on the data of each split, for the log."""

    background_save: BackgroundSave | None = field(default=None, repr=False)
    """The save that is being written while training continues; None if there is none."""

    generation_config: dict[str, Any] | None = None
    """Content of the `generation_config.json` that is saved with the tokenizer, on rank 0; None for no file."""

    exit_signal: ExitSignal | None = field(default=None, repr=False)
    """The signal that stops the run; None if no signal is caught."""

    evaluated_step: int | None = None
    """The step after which this process last evaluated the validation set; None if it hasn't yet."""

    num_nonfinite_steps: int = 0
    """How many of the last steps in a row were skipped because a loss or a gradient was not finite."""

    num_taken_steps: int = 0
    """How many steps this process has taken; skipped ones don't count."""

    watchdog: HangWatchdog = field(default_factory=HangWatchdog, repr=False)
    """Ends this rank if it hangs while it is `watched`."""

    start_time: float = field(default_factory=time.time)
    """When the run started, in seconds since 1970."""

    wandb_logger: Any = field(default=None, repr=False)
    """The Weights & Biases run, on rank 0; None on other ranks or without W&B."""

    mlflow_logger: Any = field(default=None, repr=False)
    """The module mlflow with an active run, on rank 0; None on other ranks or without MLflow."""

    _timers: Timers | None = field(default=None, repr=False)

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
    def timers(self) -> Timers:
        """Core's timers, made on first use. One above `logger.timing_log_level` does nothing."""
        if self._timers is None:
            self._timers = Timers(self.cfg.logger.timing_log_level, self.cfg.logger.timing_log_option)
        return self._timers

    @property
    def tensorboard_logger(self) -> SummaryWriter | None:
        """TensorBoard's writer, made on first use, on rank 0; None on other ranks or without TensorBoard."""
        if self._tensorboard is None and self.cfg.logger.tensorboard_dir and is_rank_0():
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                log_dir=self.cfg.logger.tensorboard_dir, max_queue=self.cfg.logger.tensorboard_queue_size
            )
        return self._tensorboard

    @property
    def straggler_timer(self) -> StragglerDetector:
        """Core's straggler detector, which is off: as a context it does nothing."""
        return StragglerDetector()

    @property
    def signal_handler(self) -> ExitSignal | None:
        """Megatron Bridge's public name for `exit_signal`."""
        return self.exit_signal

    def initialize_async_checkpoint_worker(self) -> None:
        """Nothing to do: a save in the background starts its own thread."""

    def reset_for_restart(self) -> None:
        """Forget how far the run is and what this process holds of it, so that `setup` can build it again."""
        self.close()
        self.train_state = TrainState()
        self._derived = self._timers = self.evaluated_step = None
        self.num_nonfinite_steps = 0
        self.start_time = time.time()

    def close(self) -> None:
        """Close the loggers. A save that is still being written is abandoned."""
        if self.background_save is not None:
            self.background_save.abandon()
            self.background_save = None
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard is not None:
            try:
                tensorboard.close()
            except OSError as error:
                logger.warning("TensorBoard's file in %s is cut short: %s", self.cfg.logger.tensorboard_dir, error)
