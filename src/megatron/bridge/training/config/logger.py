# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on logs and figures."""

from dataclasses import dataclass
from typing import Literal

from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class LoggerConfig(BridgeSection):
    """What is logged, how often and where."""

    _section = "logger"

    log_interval: int = 100
    """Steps between log lines."""

    log_params_norm: bool = False
    """Show the L2 norm of all weights, as the model holds them, wherever figures go."""

    log_throughput: bool = False
    """Show the floating point operations a second and device, by formula, wherever figures go (in units of 1e12)."""

    log_throughput_to_tensorboard: bool = False
    """Write the throughput to TensorBoard too."""

    throughput_window_size: int = 100
    """Steps over which the throughput is averaged."""

    log_progress: bool = False
    """Write a line to progress.txt in checkpoint.save at the start and at each checkpoint there."""

    tensorboard_dir: str | None = None
    """Directory for TensorBoard's files. None: no TensorBoard."""

    tensorboard_log_interval: int = 1
    """Steps between points in TensorBoard, Weights & Biases, MLflow and the metrics file."""

    tensorboard_queue_size: int = 1000
    """Points that may wait before they are written."""

    log_loss_scale_to_tensorboard: bool = True
    """Write the loss scale to TensorBoard."""

    log_validation_ppl_to_tensorboard: bool = False
    """Write the perplexity of each evaluation to TensorBoard."""

    log_runtime_to_tensorboard: bool = False
    """Show the time since the first step of this start, wherever figures go."""

    runtime_time_unit: Literal["seconds", "minutes", "hours", "days"] = "hours"
    """Unit of the elapsed time."""

    log_world_size_to_tensorboard: bool = False
    """Show the number of ranks, wherever figures go."""

    metrics_file: str | None = None
    """File of JSON lines. None: metrics.jsonl in tensorboard_dir, else in checkpoint.save, else none."""

    rank_log_dir: str | None = None
    """Directory for one log file of each rank, rank_00000.log and so on. None: rank 0 alone logs."""

    wandb_project: str | None = None
    """Weights & Biases project. None: no Weights & Biases."""

    wandb_exp_name: str | None = None
    """Name of the run there. None: a name made by the service."""

    wandb_save_dir: str | None = None
    """Directory for its local files. None: ./wandb."""

    wandb_entity: str | None = None
    """User or team there. None: the account's own."""

    mlflow_experiment: str | None = None
    """MLflow experiment. None: no MLflow."""

    mlflow_run_name: str | None = None
    """Name of the run there. None: a name made by MLflow."""

    mlflow_tracking_uri: str | None = None
    """Server, or file:///directory or sqlite:///file. None: MLFLOW_TRACKING_URI, else MLflow's own default."""

    mlflow_tags: dict[str, str] | None = None
    """Tags of the run there. None: no tags."""

    logging_level: int | None = None
    """Python logging level of the package, e.g. 20 for INFO. None: as the process set it."""

    filter_warnings: bool = True
    """Leave out the warnings of modules_to_filter too."""

    modules_to_filter: list[str] | None = None
    """Loggers whose lines are left out, with those below them; errors are shown. None: no logger's are."""

    set_level_for_all_loggers: bool = False
    """Apply logging_level to every logger, not only to ours."""

    save_config_filepath: str | None = None
    """File to which the final configuration is written as YAML. None: only into checkpoints."""

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        for name in ("log_interval", "tensorboard_log_interval", "tensorboard_queue_size", "throughput_window_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"logger.{name} is {getattr(self, name)}: it must be at least 1; set a positive number"
                )
