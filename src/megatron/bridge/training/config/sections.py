# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sections of a configuration, as the rules, precedence and derived values see them.

`ConfigContainer` adds what can be done with them; what is imported here knows nothing of it.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.data.config import DatasetProvider, GPTDatasetConfig, GPTSFTDatasetConfig, TokenizerConfig
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config.checkpoint import CheckpointConfig
from megatron.bridge.training.config.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config.ddp import DistributedDataParallelConfig
from megatron.bridge.training.config.dist import DistributedInitConfig
from megatron.bridge.training.config.logger import LoggerConfig
from megatron.bridge.training.config.mixed_precision import MixedPrecisionConfig
from megatron.bridge.training.config.optimizer import OptimizerConfig, OptimizerConfigOverrideProvider
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
from megatron.bridge.training.config.validation import ValidationConfig
from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class RunSections(BridgeSection):
    """Everything that a run is told, section by section."""

    rng: RNGConfig = field(default_factory=RNGConfig)
    """Random numbers."""

    rerun_state_machine: RerunStateMachineConfig = field(default_factory=RerunStateMachineConfig)
    """What happens when a step gives a result that looks wrong."""

    train: TrainingConfig
    """Batch sizes and length of the run."""

    model: GPTModelProvider
    """The model provider."""

    optimizer: OptimizerConfig
    """The optimizer."""

    optimizer_config_override_provider: OptimizerConfigOverrideProvider | None = None
    """Options for single parameters. None: Core's usual ones."""

    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    """Data parallelism."""

    scheduler: SchedulerConfig
    """Learning rate and weight decay over time."""

    dataset: GPTSFTDatasetConfig | GPTDatasetConfig | DatasetProvider
    """The data."""

    logger: LoggerConfig
    """Logs and TensorBoard."""

    tokenizer: TokenizerConfig
    """The tokenizer."""

    checkpoint: CheckpointConfig
    """What is saved and loaded."""

    dist: DistributedInitConfig = field(default_factory=DistributedInitConfig)
    """Device and process groups."""

    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Evaluation."""

    ft: FaultToleranceConfig | None = None
    """Not built; see resiliency.py. None: as if it switched nothing on."""

    nvrx_straggler: NVRxStragglerDetectionConfig | None = None
    """Not built; see resiliency.py. None: as if it switched nothing on."""

    inprocess_restart: InProcessRestartConfig | None = None
    """Not built; see resiliency.py. None: as if it switched nothing on."""

    profiling: ProfilingConfig | None = None
    """Profiles. None: none are taken."""

    peft: Any | None = None
    """Adapters that are trained in place of the weights: a `PEFT`, such as a LoRA. None: all weights are trained."""

    comm_overlap: CommOverlapConfig | None = None
    """Not built yet; see comm_overlap.py. None: ddp says what overlaps."""

    mixed_precision: str | MixedPrecisionConfig | None = None
    """Number formats, by name or in full, written into model, optimizer and ddp. None: these say it themselves."""

    env_vars: dict[str, str] = field(default_factory=dict)
    """Environment variables set before the run starts, where they aren't set already."""
