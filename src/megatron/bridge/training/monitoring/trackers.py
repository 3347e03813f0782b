# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""TensorBoard, Weights & Biases and MLflow. The last two are optional extras, imported only if they are used."""

import math
import os
import re
from typing import Any

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.monitoring.metrics import RUNS_OWN_PREFIXES, MetricsLogger, metrics_file_of
from megatron.bridge.training.monitoring.router_losses import is_router_loss
from megatron.bridge.training.state import GlobalState

_NO_NAME = re.compile(r"[^\w.\- :/]")
"""Characters that MLflow doesn't allow in names. One bad name makes it refuse all metrics of a step."""


_CURVES = {
    "max_attention_logit": "max_attention_logit",
    "energy_joules_per_device": "iter-energy/gpu",
    "power_watts_per_device": "power/gpu",
}
"""Megatron-LM's names of curves that follow no rule."""


def curve_names(split: str, values: dict[str, Any]) -> dict[str, float]:
    """Metrics under the names that Megatron-LM's curves have: `lm loss`, `learning-rate`, `lm loss validation`."""
    suffix = "" if split == "train" else f" {split}"
    numbers = {_curve(name): float(value) for name, value in values.items() if value is not None}
    return {name + suffix: value for name, value in numbers.items()}


def _curve(name: str) -> str:
    if name.startswith("timers/"):
        return f"{name.removeprefix('timers/')}-time"
    if is_router_loss(name) or name.startswith(RUNS_OWN_PREFIXES):
        return name
    return _CURVES.get(name, name.replace("_", "-"))


def perplexity(loss: float) -> float:
    """E to the loss, a mean over tokens in nats; a loss above 20 counts as 20, as in Megatron-LM."""
    return math.exp(min(20.0, loss))


class TensorBoard(MetricsLogger):
    """Writes all metrics against the step to `logger.tensorboard_dir`."""

    def open(self, state: GlobalState) -> None:
        """Create an event file there."""
        writer = state.tensorboard_logger
        assert writer is not None  # rank 0 has one where there is a directory
        self._writer = writer

    def write(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Add a point to each curve."""
        config = state.cfg.logger
        wanted = {
            "loss_scale": config.log_loss_scale_to_tensorboard,
            "throughput": config.log_throughput_to_tensorboard,
        }
        values = {name: value for name, value in values.items() if wanted.get(name, True)}
        if config.log_validation_ppl_to_tensorboard and split != "train":
            losses = {name: value for name, value in values.items() if name.split("/")[-1] == "lm loss"}
            values |= {f"{name} ppl": perplexity(value) for name, value in losses.items() if value is not None}
        for name, value in curve_names(split, values).items():
            self._writer.add_scalar(name, value, state.train_state.step)

    def close(self, *, failed: bool) -> None:
        """Flush and close the file."""
        self._writer.close()


class WeightsAndBiases(MetricsLogger):
    """Writes all metrics against the step to `logger.wandb_project`. `WANDB_MODE=offline` needs no network."""

    title = "Weights & Biases"

    def open(self, state: GlobalState) -> None:
        """Start a run there. Raises ValueError if wandb refuses."""
        import wandb

        options = state.cfg.logger
        try:
            state.wandb_logger = wandb.init(
                project=options.wandb_project,
                name=options.wandb_exp_name,
                entity=options.wandb_entity,
                dir=options.wandb_save_dir,
                config=state.cfg.to_dict(),
            )
        except (wandb.errors.Error, OSError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"logger.wandb_project={options.wandb_project!r}: wandb can't start a run ({said}): log in, or set "
                "WANDB_MODE=offline in the environment, or logger.wandb_project=null"
            ) from error
        self._run = state.wandb_logger

    def write(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Add a point to each curve."""
        self._run.log(curve_names(split, values), step=state.train_state.step)

    def close(self, *, failed: bool) -> None:
        """End the run there."""
        self._run.finish(exit_code=int(failed))


class MLflow(MetricsLogger):
    """Writes all metrics against the step to `logger.mlflow_experiment`, on a server or in a directory.

    A directory is named by `logger.mlflow_tracking_uri`, e.g. file:///home/me/runs.
    """

    def open(self, state: GlobalState) -> None:
        """Start a run there. Raises ValueError if mlflow refuses."""
        import mlflow

        options = state.cfg.logger
        # Metrics are retried anyway, and MLflow's own eight tries take four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        if options.mlflow_tracking_uri is not None:
            if options.mlflow_tracking_uri.startswith(("file:", "/", ".")):
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.17 wants it said twice
            mlflow.set_tracking_uri(options.mlflow_tracking_uri)
        try:
            mlflow.set_experiment(options.mlflow_experiment)
            run = mlflow.start_run(run_name=options.mlflow_run_name, tags=options.mlflow_tags)
            mlflow.log_text(state.cfg.to_yaml(), "run_config.yaml")
        except (mlflow.exceptions.MlflowException, OSError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"logger.mlflow_experiment={options.mlflow_experiment!r}: mlflow can't start a run ({said}): set "
                "logger.mlflow_tracking_uri to a server, or logger.mlflow_experiment=null"
            ) from error
        self._mlflow = state.mlflow_logger = mlflow
        # By run id: without one, metrics go to the active run of the calling thread, and another thread writes them.
        self._run = {} if run is None else {"run_id": run.info.run_id}

    def write(self, state: GlobalState, split: str, values: dict[str, Any]) -> None:
        """Add a point to each curve. MLflow accepts only finite numbers, and no name such as acc@1."""
        curves = curve_names(split, values)
        finite = {_NO_NAME.sub("_", name): value for name, value in curves.items() if math.isfinite(value)}
        self._mlflow.log_metrics(finite, step=state.train_state.step, **self._run)

    def close(self, *, failed: bool) -> None:
        """End the run there."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def build_loggers(cfg: ConfigContainer) -> list[MetricsLogger]:
    """The loggers for all destinations that the configuration names."""
    file = metrics_file_of(cfg)
    loggers: list[MetricsLogger] = [] if file is None else [file]
    loggers += [TensorBoard()] if cfg.logger.tensorboard_dir else []
    loggers += [WeightsAndBiases()] if cfg.logger.wandb_project else []
    loggers += [MLflow()] if cfg.logger.mlflow_experiment else []
    return loggers
