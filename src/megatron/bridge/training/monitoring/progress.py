# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The progress bar of a run. Scripts also import `MetricsFile` and `learning_rate` from here."""

import logging
import sys
from typing import Any

from tqdm import tqdm

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.monitoring.finite_steps import reasons_to_skip
from megatron.bridge.training.monitoring.metrics import MetricsFile, learning_rate, step_losses
from megatron.bridge.utils.distributed import is_rank_0

__all__ = ["MetricsFile", "ProgressBar", "learning_rate"]

logger = logging.getLogger(__name__)


class ProgressBar(Callback):
    """A bar over the run's steps: loss, learning rate, gradient norm, tokens per second and time left.

    If standard error isn't a terminal, as in a batch job, it logs a line every `logger.log_interval` steps instead.
    """

    reads_weights = False

    _bar: tqdm
    """From on_train_start on."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._steps = self._skipped = 0
        """Since the last line."""

    def on_train_start(self, context: CallbackContext) -> None:
        state = context.state
        self._bar = tqdm(
            total=state.derived.train_iters,
            initial=state.train_state.step,
            desc="train",
            unit="step",
            disable=not (is_rank_0() and self._is_terminal),
            dynamic_ncols=True,
        )

    def on_train_step_end(self, context: CallbackContext) -> None:
        shown: dict[str, Any] = {name: f"{value:.3f}" for name, value in step_losses(context).items()}
        taken = context.taken_step
        shown["lr"] = f"{taken.learning_rate:.1e}"
        if context.grad_norm is not None:
            shown["grad norm"] = f"{context.grad_norm:.2f}"
        shown["tokens/s"] = f"{taken.tokens_per_second:.0f}"
        if context.state.cfg.logger.log_throughput:
            shown["TFLOP/s/device"] = f"{context.figures['throughput']:.1f}"
        if "params_norm" in context.figures:
            shown["params norm"] = f"{context.figures['params_norm']:.3f}"
        if "num_zeros" in context.figures:
            shown["zeros in gradient"] = f"{context.figures['num_zeros']:,}"
        if "max_attention_logit" in context.figures:
            shown["max attention logit"] = f"{context.figures['max_attention_logit']:.2f}"
        if "energy_joules_per_device" in context.figures:
            shown["J/device"] = f"{context.figures['energy_joules_per_device']:.1f}"
            shown["W/device"] = f"{context.figures['power_watts_per_device']:.0f}"
        if context.fp16_loss_scale is not None:
            shown["loss scale"] = f"{context.fp16_loss_scale:g}"
        self._steps, self._skipped = self._steps + 1, self._skipped + taken.is_skipped
        if self._skipped:
            shown["skipped"] = f"{self._skipped} of {self._steps} steps ({reasons_to_skip(context.state)})"
        self._bar.set_postfix(shown)
        self._bar.update()
        step, last = context.state.train_state.step, context.state.derived.train_iters
        if not self._is_terminal and (step % context.state.cfg.logger.log_interval == 0 or step in (1, last)):
            logger.info("step %d/%d: %s", step, last, ", ".join(f"{name} {value}" for name, value in shown.items()))
            self._steps = self._skipped = 0

    def on_train_end(self, context: CallbackContext) -> None:
        self._bar.close()
