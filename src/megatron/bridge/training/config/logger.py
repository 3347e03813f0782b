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

    timing_log_level: Literal[0, 1, 2] = 0
    """Which phases of a step are timed: 0 none, 1 those that a step has once, 2 those of each micro-batch and of the
    offloaded step too. A timed phase waits for the device, so the levels above 0 make steps slower."""

    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    """What the log shows of each timer: the slowest rank, the fastest and the slowest, or all ranks."""

    barrier_with_L1_time: bool = True
    """Let all ranks meet before a phase of level 1 is timed, so that it doesn't include the wait for other ranks."""

    log_timers_to_tensorboard: bool = False
    """Write the seconds that each timer takes a step, on the slowest rank, wherever figures go."""

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

    log_memory_to_tensorboard: bool = False
    """Show rank 0's device memory, wherever figures go; without a GPU, the resident memory of its process."""

    memory_keys: dict[str, str] | None = None
    """What is shown of torch.cuda.memory_stats(), and as what: {"allocated_bytes.all.peak": "peak"}. None: bytes
    allocated and reserved, their peak, and the number of allocations."""

    log_memory_interval: int | None = None
    """Steps between lines in the log with the memory of the rank that holds most. None: no such lines."""

    log_device_memory_used: bool = False
    """Show what all processes together use of rank 0's device, wherever memory is shown; without a GPU, of the host."""

    log_l2_norm_grad_to_tensorboard: bool = False
    """Write the L2 norm of each parameter's gradient, before clipping, wherever figures go."""

    log_num_zeros_in_grad: bool = False
    """Show how many elements of all gradients are 0, wherever figures go."""

    log_max_attention_logit: bool = False
    """Show the largest attention logit of a step, wherever figures go. Needs Transformer Engine's attention."""

    log_energy: bool = False
    """Show energy and power, means over devices, wherever figures go. Needs a GPU and the package nvidia-ml-py."""

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

    def takes_figures_of(self, step: int) -> bool:
        """Whether some place takes the figures of a step: only then are they worth a pass over all weights."""
        return any(step % interval == 0 for interval in (self.log_interval, self.tensorboard_log_interval))

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
        if self.log_memory_interval is not None and self.log_memory_interval < 1:
            raise ValueError(
                f"logger.log_memory_interval is {self.log_memory_interval}: it must be at least 1; set a positive "
                "number, or null for no lines"
            )
