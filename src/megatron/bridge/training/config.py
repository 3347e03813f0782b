# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a run: `ConfigContainer` and, re-exported, the classes of its sections.

    cfg = ConfigContainer(model=..., train=TrainingConfig(...), ...)
    runtime_config_update(cfg)   # resolves mixed precision and deprecated names, then validates
    derived = cfg.derive()       # frozen: data-parallel size, micro-batches, schedule lengths

Public import paths are the ones scripts know; the classes live in config_*.py beside this file, in data/config.py and
in models/gpt_provider.py.
"""

import dataclasses
import logging
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from megatron.bridge.training import config_derived
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config_checkpoint import CheckpointConfig
from megatron.bridge.training.config_checks import RULES
from megatron.bridge.training.config_checks_optimizer import log_what_is_offloaded
from megatron.bridge.training.config_derived import DerivedConfig
from megatron.bridge.training.config_logging import LoggerConfig, ProfilingConfig
from megatron.bridge.training.config_optimizer import (
    DistributedDataParallelConfig,
    OptimizerConfig,
    OptimizerConfigOverrideProvider,
    OptimizerConfigOverrideProviderContext,
)
from megatron.bridge.training.config_precedence import (
    apply_mixed_precision,
    forget_what_agrees,
    share_between_ddp_and_optimizer,
)
from megatron.bridge.training.config_processes import DistributedInitConfig, RerunStateMachineConfig, RNGConfig
from megatron.bridge.training.config_sections import SchedulerConfig, TrainingConfig, ValidationConfig
from megatron.bridge.training.config_unsupported import log_options_without_effect
from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
from megatron.bridge.utils import distributed
from megatron.bridge.utils.config_texts import resolve_texts
from megatron.bridge.utils.targets import publish
from megatron.bridge.utils.yaml_io import ConfigFileError, dump_yaml, from_yaml_dict, load_yaml, to_yaml_dict

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ConfigContainer:
    """Everything that a run is told."""

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

    ft: Any | None = None
    """Fault tolerance. Not built yet."""

    straggler: Any | None = None
    """Search for slow ranks. Not built yet."""

    nvrx_straggler: Any | None = None
    """The same by NVIDIA's resiliency extension. Not built yet."""

    tensor_inspect: Any | None = None
    """Statistics on tensors. Not built yet."""

    inprocess_restart: Any | None = None
    """Restart without leaving the process. Not built yet."""

    data_parallel_size: int | None = field(init=False, default=None, repr=False)
    """Copies of the model. Filled by runtime_config_update and set_data_parallel_size; None before."""

    _checkpoint_load_required: bool = field(init=False, default=False, repr=False)
    """finetune() sets it: a run that finds nothing to load must not start."""

    def __post_init__(self) -> None:
        """What agrees with `mixed_precision` now follows it when it is changed."""
        forget_what_agrees(self)

    def get_data_parallel_size(self, world_size: int) -> int:
        """Copies of the model on this many ranks.

        Raises:
            ValueError: The parallel sizes don't divide the number of ranks.
        """
        return config_derived.data_parallel_size(self, world_size)

    def set_data_parallel_size(self, world_size: int | None = None) -> None:
        """Write `data_parallel_size`. None: for the ranks of this run."""
        self.data_parallel_size = self.get_data_parallel_size(world_size or distributed.world_size())

    def derive(self, world_size: int | None = None) -> DerivedConfig:
        """What follows from the configuration, frozen. None: for the ranks of this run."""
        return config_derived.derive(self, world_size or distributed.world_size())

    def validate(self, world_size: int | None = None) -> None:
        """Check everything before anything is built.

        First each section's own fields, then the rules across sections, then Core's classes finish themselves
        (`finalize()`), so that a rule that names the option speaks before a bare assertion of Core's.

        Args:
            world_size: Ranks of the run. None: those of this process's group, or torchrun's, or 1.

        Raises:
            ValueError: One line with the option, what it holds, what is expected, and the way out.
        """
        ranks = world_size or distributed.world_size()
        for name in ("train", "validation", "scheduler", "rng", "dist", "rerun_state_machine", "logger", "checkpoint"):
            getattr(self, name).finalize()
        if self.profiling is not None:
            self.profiling.finalize()
        for rule in RULES:
            rule(self, ranks)
        for section in (self.optimizer, self.ddp, self.model, self.dataset, self.tokenizer):
            section.finalize()
        log_what_is_offloaded(self)
        log_options_without_effect(self)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dictionaries with `_target_`."""
        return to_yaml_dict(self)

    def to_yaml(self, yaml_path: str | Path | None = None) -> str:
        """Write the configuration as YAML and return the text. None: only return it."""
        return dump_yaml(self, yaml_path)

    def print_yaml(self) -> None:
        """Show the configuration as YAML on standard output."""
        sys.stdout.write(self.to_yaml())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *, strict: bool = True) -> "ConfigContainer":
        """The configuration that `to_dict` described.

        Args:
            config_dict: Dictionaries with `_target_`; sections may leave it out where their class is known.
            strict: Refuse unknown fields and values that weren't saved. False: leave them at their defaults.

        Raises:
            ConfigFileError: An unknown name or field, or a value of the wrong type; it says where.
        """
        read = from_yaml_dict(config_dict, expected=cls, strict=strict)
        if not isinstance(read, cls):
            raise ConfigFileError(f"config is a {type(read).__name__}: expected a {cls.__name__}")
        return read

    @classmethod
    def from_yaml(cls, yaml_path: str | Path, *, strict: bool = True) -> "ConfigContainer":
        """The configuration in a YAML file; see `from_dict`.

        Raises:
            FileNotFoundError: There is no such file.
            ConfigFileError: The file can't be read as a configuration; it says where.
        """
        try:
            return cls.from_dict(load_yaml(yaml_path), strict=strict)
        except ConfigFileError as error:
            raise ConfigFileError(f"{yaml_path}: {error}") from error

    def log_non_default_values(self) -> None:
        """Log the fields that differ from their class's defaults."""
        for name in [entry.name for entry in dataclasses.fields(self)]:
            changed = _non_default_values(getattr(self, name))
            if changed:
                shown = ", ".join(f"{key}={value!r}" for key, value in changed.items())
                logger.info("%s: %s", name, re.sub(r" at 0x[0-9a-f]+", "", shown))


def _non_default_values(section: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults; a field without a default always does."""
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        return {}
    changed = {}
    for entry in dataclasses.fields(section):
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        value = getattr(section, entry.name, None)
        if entry.init and entry.repr and value is not default and value != default:
            changed[entry.name] = value
    return changed


_VARIABLES_OF_CODE = ("LD_", "DYLD_", "PYTHON", "PATH")
"""What environment variables begin with that say which code a process loads; a configuration may be another's."""


def runtime_config_update(cfg: ConfigContainer) -> None:
    """Finish a configuration: the one place that writes one section's choices into another.

    Resolves `~` and `${...}` in all texts, sets the environment variables that aren't set, moves deprecated fields to
    their new place, writes mixed precision into model, optimizer and ddp, makes ddp and optimizer agree on what they
    share, fills the schedule's lengths, and validates. A second call changes nothing.

    Raises:
        ValueError: See `ConfigContainer.validate`.
    """
    resolve_texts(cfg)
    for name, value in cfg.env_vars.items():
        if name.startswith(_VARIABLES_OF_CODE):
            raise ValueError(f"env_vars.{name} would make processes load other code: set it where the run is started")
        if not isinstance(value, str | int | float):
            raise ValueError(f"env_vars.{name} is {value!r}: expected a text; names of variables have no dots")
        os.environ.setdefault(name, str(value))
    _move_deprecated_fields(cfg)
    apply_mixed_precision(cfg)
    share_between_ddp_and_optimizer(cfg)
    cfg.validate()
    derived = cfg.derive()
    cfg.data_parallel_size = derived.data_parallel_size
    cfg.train.global_batch_size = derived.global_batch_size
    for name in ("lr_decay_steps", "lr_warmup_steps", "wd_incr_steps", "wsd_decay_steps"):
        setattr(cfg.scheduler, name, getattr(derived, name))


def _move_deprecated_fields(cfg: ConfigContainer) -> None:
    """Give eval_iters, eval_interval and skip_train on TrainingConfig to ValidationConfig, where they live now."""
    for name in ("eval_iters", "eval_interval", "skip_train"):
        value = getattr(cfg.train, name)
        if value is not None:
            logger.warning("train.%s=%s is deprecated: moved to validation.%s", name, value, name)
            setattr(cfg.validation, name, value)
            setattr(cfg.train, name, None)


publish(
    __name__,
    CheckpointConfig,
    DatasetProvider,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    GPTDatasetConfig,
    GPTSFTDatasetConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
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
    "FinetuningDatasetConfig",
    "GPTDatasetConfig",
    "GPTModelProvider",
    "GPTSFTDatasetConfig",
    "LoggerConfig",
    "MixedPrecisionConfig",
    "MockGPTDatasetConfig",
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
    "runtime_config_update",
]
