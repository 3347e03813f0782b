# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a run: `ConfigContainer`, the classes of its sections, and what finishes them.

This is their public import path, and the module that files name them by. A section has a file of its own here; those
on data and model live with their owners.
"""

from megatron.bridge.data.config import (
    DataloaderConfig,
    DatasetBuildContext,
    DatasetProvider,
    FinetuningDatasetConfig,
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    MockGPTDatasetConfig,
    TokenizerConfig,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config.checkpoint import CheckpointConfig
from megatron.bridge.training.config.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config.container import ConfigContainer
from megatron.bridge.training.config.ddp import DistributedDataParallelConfig
from megatron.bridge.training.config.derived import DerivedConfig
from megatron.bridge.training.config.dist import DistributedInitConfig
from megatron.bridge.training.config.logger import LoggerConfig
from megatron.bridge.training.config.mixed_precision import MixedPrecisionConfig
from megatron.bridge.training.config.optimizer import (
    LoRAPlusOverrideProvider,
    OptimizerConfig,
    OptimizerConfigOverrideProvider,
    OptimizerConfigOverrideProviderContext,
)
from megatron.bridge.training.config.profiling import ProfilingConfig
from megatron.bridge.training.config.rerun_state_machine import RerunStateMachineConfig
from megatron.bridge.training.config.resiliency import (
    FaultToleranceConfig,
    InProcessRestartConfig,
    NVRxStragglerDetectionConfig,
)
from megatron.bridge.training.config.rng import RNGConfig
from megatron.bridge.training.config.scheduler import SchedulerConfig
from megatron.bridge.training.config.train import TrainingConfig
from megatron.bridge.training.config.update import apply_environment_variables, runtime_config_update
from megatron.bridge.training.config.validation import ValidationConfig
from megatron.bridge.utils.targets import publish
from megatron.bridge.utils.yaml_io import ConfigFileError

publish("megatron.bridge.training.comm_overlap", CommOverlapConfig)
publish("megatron.bridge.training.mixed_precision", MixedPrecisionConfig)
publish(
    __name__,
    ConfigContainer,
    CheckpointConfig,
    DatasetProvider,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    FaultToleranceConfig,
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    InProcessRestartConfig,
    LoRAPlusOverrideProvider,
    LoggerConfig,
    MockGPTDatasetConfig,
    NVRxStragglerDetectionConfig,
    OptimizerConfig,
    OptimizerConfigOverrideProvider,
    ProfilingConfig,
    RNGConfig,
    RerunStateMachineConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "CommOverlapConfig",
    "ConfigContainer",
    "ConfigFileError",
    "DataloaderConfig",
    "DatasetBuildContext",
    "DatasetProvider",
    "DerivedConfig",
    "DistributedDataParallelConfig",
    "DistributedInitConfig",
    "FaultToleranceConfig",
    "FinetuningDatasetConfig",
    "GPTDatasetConfig",
    "GPTModelProvider",
    "GPTSFTDatasetConfig",
    "InProcessRestartConfig",
    "LoRAPlusOverrideProvider",
    "LoggerConfig",
    "MixedPrecisionConfig",
    "MockGPTDatasetConfig",
    "NVRxStragglerDetectionConfig",
    "OptimizerConfig",
    "OptimizerConfigOverrideProvider",
    "OptimizerConfigOverrideProviderContext",
    "ProfilingConfig",
    "RNGConfig",
    "RerunStateMachineConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "ValidationConfig",
    "apply_environment_variables",
    "runtime_config_update",
]
