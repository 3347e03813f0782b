# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run shows while it goes: a progress bar, TensorBoard, and a file of metrics. Each is a callback on rank 0."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.utils.distributed import is_rank_0

logger = logging.getLogger(__name__)


def learning_rate(context: CallbackContext) -> float:
    """The learning rate of the next step, from the first group that follows the plain schedule."""
    groups = context.optimizer.param_groups
    return float(next((group["lr"] for group in groups if group.get("default_config", True)), groups[0]["lr"]))


class ProgressBar(Callback):
    """A bar over the run's steps: loss, learning rate, gradient norm, tokens per second and time left.

    Where standard error is no terminal (a batch job's log), it is a line every `logger.log_interval` steps instead.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._is_terminal = sys.stderr.isatty()

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
        shown: dict[str, Any] = {name: f"{value:.3f}" for name, value in context.loss_dict.items()}
        shown["lr"] = f"{learning_rate(context):.1e}"
        if context.grad_norm is not None:
            shown["grad norm"] = f"{context.grad_norm:.2f}"
        shown["tokens/s"] = f"{context.tokens_per_second:.0f}"
        self._bar.set_postfix(shown)
        self._bar.update()
        step, last = context.state.train_state.step, context.state.derived.train_iters
        if not self._is_terminal and (step % context.state.cfg.logger.log_interval == 0 or step in (1, last)):
            logger.info("step %d/%d: %s", step, last, ", ".join(f"{name} {value}" for name, value in shown.items()))

    def on_train_end(self, context: CallbackContext) -> None:
        self._bar.close()


class TensorBoard(Callback):
    """Losses, learning rate, gradient norm and throughput against the step, in `logger.tensorboard_dir`."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        writer, step = context.state.tensorboard_logger, context.state.train_state.step
        if writer is None or step % context.state.cfg.logger.tensorboard_log_interval:
            return
        for name, value in context.loss_dict.items():
            writer.add_scalar(name, value, step)
        writer.add_scalar("learning-rate", learning_rate(context), step)
        writer.add_scalar("tokens-per-second", context.tokens_per_second, step)
        if context.grad_norm is not None:
            writer.add_scalar("grad-norm", context.grad_norm, step)

    def on_eval_end(self, context: CallbackContext) -> None:
        writer = context.state.tensorboard_logger
        if writer is not None:
            for name, value in context.loss_dict.items():
                writer.add_scalar(f"{name} validation", value, context.state.train_state.step)


class MetricsFile(Callback):
    """One JSON line for each step and each evaluation, flushed as it is written.

    Args:
        path: The file; a resumed run appends to it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: TextIO | None = None
        self._started = time.monotonic()

    def _write(self, context: CallbackContext, **values: Any) -> None:
        if not is_rank_0():
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        elapsed = round(time.monotonic() - self._started, 3)
        line = {"step": context.state.train_state.step, **values, "elapsed_seconds": elapsed}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def on_train_step_end(self, context: CallbackContext) -> None:
        self._write(
            context,
            split="train",
            **context.loss_dict,
            learning_rate=learning_rate(context),
            grad_norm=context.grad_norm,
            num_tokens=context.num_tokens,
            step_seconds=round(context.step_seconds, 4),
            tokens_per_second=round(context.tokens_per_second, 1),
        )

    def on_eval_end(self, context: CallbackContext) -> None:
        self._write(context, split="validation", **context.loss_dict, num_tokens=context.num_tokens)

    def on_test_end(self, context: CallbackContext) -> None:
        self._write(context, split="test", **context.loss_dict, num_tokens=context.num_tokens)
