# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on trackers and profiles."""

import importlib.util

from megatron.bridge.training.config.sections import RunSections

PROFILE_DIRECTORY = "profile"


def check_trackers_are_installed(cfg: RunSections, world_size: int) -> None:
    """What is asked for is there; the packages are extras."""
    for option, module, extra in (
        ("wandb_project", "wandb", "wandb"),
        ("mlflow_experiment", "mlflow", "mlflow"),
    ):
        if not getattr(cfg.logger, option):
            continue
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb leaves behind, is no package
            raise ValueError(
                f"logger.{option}={getattr(cfg.logger, option)!r} needs the package {module}, which is not installed: "
                f'pip install "megatron-bridge[{extra}]", or set logger.{option}=null'
            )


def check_progress_has_a_place(cfg: RunSections, world_size: int) -> None:
    """The progress file lies beside the checkpoints."""
    if cfg.logger.log_progress and cfg.checkpoint.save is None:
        raise ValueError(
            "logger.log_progress=true without checkpoint.save: progress.txt is written beside the checkpoints; set "
            "checkpoint.save, or logger.log_progress=false"
        )


def check_profiles_have_a_place(cfg: RunSections, world_size: int) -> None:
    """Torch's profiler writes its traces below TensorBoard's directory, and the ranks to profile are there."""
    config = cfg.profiling
    if config is None:
        return
    if config.use_pytorch_profiler and cfg.logger.tensorboard_dir is None:
        raise ValueError(
            "profiling.use_pytorch_profiler=true needs logger.tensorboard_dir: set it to a directory; traces are "
            f"written to {PROFILE_DIRECTORY}/ in it"
        )
    if config.pytorch_profiler_collect_chakra and not config.use_pytorch_profiler:
        raise ValueError(
            "profiling.pytorch_profiler_collect_chakra=true is an option of torch's profiler: set "
            "profiling.use_pytorch_profiler=true too"
        )
    if not any(
        (config.use_pytorch_profiler, config.use_nsys_profiler, config.record_memory_history, config.nvtx_ranges)
    ):
        return
    absent = [wanted for wanted in config.profile_ranks if not 0 <= wanted < world_size]
    if absent:
        raise ValueError(f"profiling.profile_ranks holds {absent[0]}: the run has ranks 0 to {world_size - 1}")
