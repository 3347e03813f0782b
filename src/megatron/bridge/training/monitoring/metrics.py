# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where a run's metrics go: one small interface, and a file of JSON lines that is always written.

trackers.py implements the same interface for TensorBoard, Weights & Biases and MLflow.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.monitoring.metrics_queue import MetricsQueue, Patience
from megatron.bridge.training.monitoring.preemption import Preempted
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.device import peak_memory_bytes
from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks
from megatron.bridge.utils.files import check_writable_directory

METRICS_FILE = "metrics.jsonl"

RUNS_OWN = frozenset(
    "step split elapsed_seconds learning_rate grad_norm num_tokens step_seconds tokens_per_second peak_memory_bytes "
    "skipped loss_scale throughput runtime world_size params_norm num_zeros max_attention_logit "
    "energy_joules_per_device power_watts_per_device".split()
)
"""Names that a loss function's metrics can't have in a line. Such a metric is written as `reported step` and so on."""

RUNS_OWN_PREFIXES = ("l2_norm/", "memory/", "timers/")
"""What other such names begin with."""


def is_runs_own(name: str) -> bool:
    """Whether a name in a line is a figure of the run, not a loss."""
    return name in RUNS_OWN or name.startswith(RUNS_OWN_PREFIXES)


def learning_rate(context: CallbackContext) -> float:
    """The optimizer's current learning rate, which after a step is the next one's.

    It is that of the first param group that follows the plain schedule.
    """
    groups = context.optimizer.param_groups
    if not groups:  # a rank on which nothing is trained
        return float(context.scheduler.get_lr({}))
    return float(next((group["lr"] for group in groups if group.get("default_config", True)), groups[0]["lr"]))


def step_losses(context: CallbackContext) -> dict[str, float]:
    """The losses that the loss function reported for a step, and those that routers added. The former win."""
    losses = context.loss_dict or {}
    return losses | {name: value for name, value in context.router_losses.items() if name not in losses}


def step_values(context: CallbackContext) -> dict[str, Any]:
    """What is logged for a training step: its losses and other metrics, by name."""
    step = context.taken_step
    return {
        **context.router_losses_by_layer,
        **_numbers(step_losses(context)),
        "learning_rate": context.learning_rate,
        "grad_norm": context.grad_norm,
        "num_tokens": context.num_tokens,
        "step_seconds": round(step.seconds, 4),
        "tokens_per_second": round(step.tokens_per_second, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "skipped": context.skipped_iter,
        **({} if context.fp16_loss_scale is None else {"loss_scale": context.fp16_loss_scale}),
        **context.figures,
    }


def _evaluation_values(context: CallbackContext) -> dict[str, Any]:
    return {**_numbers(context.loss_dict or {}), "num_tokens": context.num_tokens}


def _numbers(losses: dict[str, float]) -> dict[str, float | None]:
    """Losses as numbers; None where no token counted, so that no curve falls to 0."""
    return {
        f"reported {name}" if is_runs_own(name) else name: None if math.isnan(value) else value
        for name, value in losses.items()
    }


class MetricsLogger(Callback):
    """A destination for metrics. Override `write`, and `open` and `close` if needed. Only rank 0 calls them.

    Only `open` can refuse a run. An error of `write` or `close` is logged as a warning and the run continues; metrics
    that couldn't be written are queued and retried. Unless `writes_at_once`, `write` is called in a separate thread, so
    that a slow destination doesn't delay a step.
    """

    reads_weights = False

    title: str | None = None
    """Name of the destination, for the log. None: the class's name."""

    writes_at_once: ClassVar[bool] = False
    """Call `write` during the step, in the training thread: for a local file, or a library that isn't thread-safe."""

    patience: Patience = Patience()
    """How long lines wait for a destination that doesn't answer."""

    _queue: MetricsQueue | None = None

    def open(self, state: GlobalState) -> None:
        """Open the destination, before anything is built. Raise here if it can't work."""

    def write(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Write the metrics of the step in `state.train_state`.

        Args:
            state: The run, as it was at that step.
            split: `train`, `validation` or `test`.
            values: Numbers by name; None if a metric has no value.
        """
        raise NotImplementedError

    def close(self, *, failed: bool) -> None:
        """Close the destination at the end of the run."""

    def deliver(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Queue metrics to be written; write them at once if the logger wasn't opened by `open_loggers`."""
        if self._queue is None:
            self.write(state, split, values)
        else:
            self._queue.hand_over(state, split, values)

    def on_train_step_end(self, context: CallbackContext) -> None:
        state = context.state
        if is_rank_0() and state.train_state.step % state.cfg.logger.tensorboard_log_interval == 0:
            self.deliver(state, "train", step_values(context))

    def on_eval_end(self, context: CallbackContext) -> None:
        if is_rank_0():
            self.deliver(context.state, "validation", _evaluation_values(context))

    def on_test_end(self, context: CallbackContext) -> None:
        if is_rank_0():
            self.deliver(context.state, "test", _evaluation_values(context))


class MetricsFile(MetricsLogger):
    """One JSON line for each logged step and each evaluation, flushed at once.

    A resumed run appends. Steps that it repeats are in the file again, and their last line counts.

    Args:
        path: The file.
        option: The option that named the file or its directory, for errors.
    """

    writes_at_once = True

    def __init__(self, path: str | Path, *, option: str = "MetricsFile") -> None:
        self.path, self._option = Path(path), option
        self.title = f"the metrics file {path}"
        self._file: IO[bytes] | None = None
        self._started = time.monotonic()

    def open(self, state: GlobalState) -> None:
        """Open the file. Raises ValueError if it can't be written."""
        self._file = self._opened()

    def _opened(self) -> IO[bytes]:
        check_writable_directory(self.path.parent, self._option)
        _cut_torn_line(self.path)
        return self.path.open("ab", buffering=0)

    def write(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Append a line. JSON has no NaN and no infinity, so they become null.

        Raises:
            OSError: The line can't be written, e.g. because the disk is full. No part of it is in the file then.
        """
        if self._file is None:
            self._file = self._opened()
        finite = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        elapsed = round(time.monotonic() - self._started, 3)
        line = {"step": state.train_state.step, "split": split, **finite, "elapsed_seconds": elapsed}
        self._append(self._file, (json.dumps(line) + "\n").encode())

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _append(self, file: IO[bytes], line: bytes) -> None:
        """Append a whole line or nothing. The error names the file, which the system's error doesn't.

        Raises:
            OSError: It can't be written.
        """
        before = os.fstat(file.fileno()).st_size
        rest = line
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise OSError(
                error.errno,
                f"{self.path} ({self._option}) can't be written ({error.strerror}): free space there or make it "
                "writable",
            ) from error


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a process leaves that was killed while writing."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, ordered by step; for each step and split the line that was written last.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than the last isn't valid JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    newest: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # incomplete, or being written
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}; expected a JSON object on each line") from error
        newest[values["step"], values["split"]] = values
    return [newest[key] for key in sorted(newest)]


def metrics_file_of(cfg: ConfigContainer) -> MetricsFile | None:
    """The metrics file of a run; None if the run writes no files."""
    if cfg.logger.metrics_file is not None:
        return MetricsFile(cfg.logger.metrics_file, option="logger.metrics_file")
    for option, directory in (
        ("logger.tensorboard_dir", cfg.logger.tensorboard_dir),
        ("checkpoint.save", cfg.checkpoint.save),
    ):
        if directory is not None:
            return MetricsFile(Path(directory) / METRICS_FILE, option=option)
    return None


@contextlib.contextmanager
def open_loggers(loggers: Sequence[MetricsLogger], state: GlobalState) -> Iterator[None]:
    """Keep loggers open within the context. Call on all ranks; rank 0 opens and closes them.

    Raises:
        ValueError: On all ranks, if one can't be opened.
    """
    own = loggers if is_rank_0() else ()
    with raise_on_all_ranks("opening the loggers"):
        for logger in own:
            logger.open(state)
    queues = []
    for logger in own:
        name = getattr(logger, "title", None) or type(logger).__name__
        logger._queue = queue = MetricsQueue(
            name, logger.write, at_once=logger.writes_at_once, patience=logger.patience
        )
        queues.append(queue)
    failed = True
    try:
        yield
        failed = False
    except Preempted:
        failed = False
        raise
    finally:
        for logger, queue in zip(own, queues, strict=True):
            logger._queue = None
            queue.finish(partial(logger.close, failed=failed))
