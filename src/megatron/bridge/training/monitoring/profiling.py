# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Record some steps: with torch's profiler, with Nsight Systems, or each allocation on the device.

What records a GPU alone (Nsight Systems, allocations, NVTX ranges) has never run: no machine of ours could.
"""

import logging
from pathlib import Path

import torch
from megatron.core.utils import configure_nvtx_profiling

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer, ProfilingConfig
from megatron.bridge.training.config.rules.monitoring import PROFILE_DIRECTORY
from megatron.bridge.utils.device import (
    has_gpu,
    profiled_activities,
    record_memory_history,
    start_device_profiler,
    stop_device_profiler,
    write_memory_history,
)
from megatron.bridge.utils.distributed import rank

logger = logging.getLogger(__name__)


class _Recorder(Callback):
    """Records this rank from step `profile_step_start` until `profile_step_end`, counted from 0."""

    reads_weights = False

    def __init__(self, config: ProfilingConfig) -> None:
        self._config = config
        self._is_recording = False

    def on_train_step_start(self, context: CallbackContext) -> None:
        config, step = self._config, context.state.train_state.step
        if not self._is_recording and config.profile_step_start <= step < config.profile_step_end:
            self._is_recording = True
            self._start()

    def on_train_step_end(self, context: CallbackContext) -> None:
        if context.state.train_state.step >= self._config.profile_step_end:
            self._finish()

    def on_train_end(self, context: CallbackContext) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._is_recording:
            self._is_recording = False
            self._stop()

    def _start(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        raise NotImplementedError


class StepProfiler(_Recorder):
    """Torch's profiler: traces for TensorBoard, Perfetto and chrome://tracing."""

    def __init__(self, config: ProfilingConfig, directory: Path) -> None:
        super().__init__(config)
        self._directory = directory

    def _start(self) -> None:
        config, name = self._config, f"rank_{rank():05d}"
        self._chakra: torch.profiler.ExecutionTraceObserver | None = None
        if config.pytorch_profiler_collect_chakra:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._chakra = torch.profiler.ExecutionTraceObserver()
            self._chakra.register_callback(str(self._directory / f"{name}.execution_trace.json"))
        self._profiler = torch.profiler.profile(
            activities=profiled_activities(),
            record_shapes=config.record_shapes or config.pytorch_profiler_collect_shapes,
            with_stack=config.pytorch_profiler_collect_callstack,
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self._directory), worker_name=name),
            execution_trace_observer=self._chakra,
        )
        self._profiler.start()

    def _stop(self) -> None:
        self._profiler.stop()
        if self._chakra is not None:
            self._chakra.unregister_callback()  # else the end of its file waits for the garbage collector
        logger.info("wrote the profile of this rank's steps to %s", self._directory)


class NsightSystems(_Recorder):
    """Lets Nsight Systems record the steps, with a range for each operation."""

    def _start(self) -> None:
        start_device_profiler()
        self._ranges = torch.autograd.profiler.emit_nvtx(record_shapes=self._config.record_shapes)
        self._ranges.__enter__()

    def _stop(self) -> None:
        self._ranges.__exit__(None, None, None)
        stop_device_profiler()


class MemoryHistory(_Recorder):
    """Each allocation on the device, from the start of training on: what lives in a step was mostly made before it."""

    def __init__(self, config: ProfilingConfig, path: Path) -> None:
        super().__init__(config)
        self._path = path

    def on_train_start(self, context: CallbackContext) -> None:
        self._is_recording = True
        record_memory_history()

    def _stop(self) -> None:
        write_memory_history(self._path)
        logger.info("wrote the history of this rank's device memory to %s", self._path)


class NamedPhases(Callback):
    """Core's phases as NVTX ranges."""

    reads_weights = False

    def on_train_start(self, context: CallbackContext) -> None:
        configure_nvtx_profiling(True)

    def on_train_end(self, context: CallbackContext) -> None:
        configure_nvtx_profiling(False)


def build_profilers(cfg: ConfigContainer) -> list[Callback]:
    """What records this rank, if it is to be profiled.

    Raises:
        ValueError: What is asked for needs a GPU, and this process has none.
    """
    config = cfg.profiling
    if config is None:
        return []
    _check_device(config)
    ranks = config.profile_ranks or [0]
    if rank() not in ranks:
        return []
    profilers: list[Callback] = []
    if config.use_pytorch_profiler:
        assert cfg.logger.tensorboard_dir is not None  # check_profiles_have_a_place refuses it
        profilers.append(StepProfiler(config, Path(cfg.logger.tensorboard_dir) / PROFILE_DIRECTORY))
    if config.use_nsys_profiler:
        profilers.append(NsightSystems(config))
    if config.record_memory_history:
        path = Path(config.memory_snapshot_path)
        own = path if rank() == ranks[0] else path.with_stem(f"{path.stem}_rank_{rank():05d}")
        profilers.append(MemoryHistory(config, own))
    return profilers + ([NamedPhases()] if config.nvtx_ranges else [])


def _check_device(config: ProfilingConfig) -> None:
    for name in ("use_nsys_profiler", "record_memory_history", "nvtx_ranges"):
        if getattr(config, name) and not has_gpu():
            raise ValueError(
                f"profiling.{name}=true needs a GPU, and this process has none: set profiling.{name}=false; "
                "profiling.use_pytorch_profiler=true records the host"
            )
