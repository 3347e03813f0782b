# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Record some steps with torch's profiler, as traces for TensorBoard, Perfetto and chrome://tracing."""

import logging
from pathlib import Path

import torch

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer, ProfilingConfig
from megatron.bridge.training.config.rules.monitoring import PROFILE_DIRECTORY
from megatron.bridge.utils.device import profiled_activities
from megatron.bridge.utils.distributed import rank

logger = logging.getLogger(__name__)


class StepProfiler(Callback):
    """Records this rank from step `profile_step_start` until `profile_step_end`, counted from 0."""

    def __init__(self, config: ProfilingConfig, directory: Path) -> None:
        self._config, self._directory = config, directory
        self._profiler: torch.profiler.profile | None = None

    def on_train_step_start(self, context: CallbackContext) -> None:
        config, step = self._config, context.state.train_state.step
        if self._profiler is None and config.profile_step_start <= step < config.profile_step_end:
            self._profiler = torch.profiler.profile(
                activities=profiled_activities(),
                record_shapes=config.record_shapes or config.pytorch_profiler_collect_shapes,
                with_stack=config.pytorch_profiler_collect_callstack,
                on_trace_ready=torch.profiler.tensorboard_trace_handler(
                    str(self._directory), worker_name=f"rank_{rank():05d}"
                ),
            )
            self._profiler.start()

    def on_train_step_end(self, context: CallbackContext) -> None:
        if context.state.train_state.step >= self._config.profile_step_end:
            self._finish()

    def on_train_end(self, context: CallbackContext) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            logger.info("wrote the profile of this rank's steps to %s", self._directory)


def build_profilers(cfg: ConfigContainer) -> list[Callback]:
    """This rank's profiler, if it is to be profiled."""
    config = cfg.profiling
    if config is None or not config.use_pytorch_profiler or rank() not in (config.profile_ranks or [0]):
        return []
    assert cfg.logger.tensorboard_dir is not None  # check_profiles_have_a_place refuses it
    return [StepProfiler(config, Path(cfg.logger.tensorboard_dir) / PROFILE_DIRECTORY)]
