# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The sections that Megatron-Core owns: optimizer and data-parallel wrapper.

Core checks its classes the moment they are made, before overrides and mixed precision had their say. These subclasses
wait until `finalize()`, which can be called again at any time.
"""

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig as CoreDistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_standard_config_overrides

from megatron.bridge.training.config_sections import SchedulerConfig


@dataclass
class OptimizerConfig(CoreOptimizerConfig):
    """Megatron-Core's optimizer options, checked in `finalize()` instead of at birth."""

    def __post_init__(self) -> None:
        """Do nothing yet: overrides and mixed precision come first."""

    def finalize(self) -> None:
        """Run Core's checks and let it derive its own flags.

        Raises:
            ValueError: naming the option that can't work.
        """
        try:
            super().__post_init__()
        except (
            AssertionError,
            RuntimeError,
            TypeError,
        ) as error:  # TypeError: 0.16 compares a version that isn't there
            raise ValueError(f"optimizer: {error}") from error


@dataclass
class DistributedDataParallelConfig(CoreDistributedDataParallelConfig):
    """Megatron-Core's data-parallel options, checked in `finalize()` instead of at birth."""

    def __post_init__(self) -> None:
        """Do nothing yet: overrides and mixed precision come first."""

    def finalize(self) -> None:
        """Run Core's checks.

        Raises:
            ValueError: naming the option that can't work.
        """
        try:
            super().__post_init__()
        except AssertionError as error:
            raise ValueError(f"ddp: {error}") from error


@dataclass(frozen=True, kw_only=True)
class OptimizerConfigOverrideProviderContext:
    """What an `OptimizerConfigOverrideProvider` may look at."""

    scheduler_config: SchedulerConfig
    """The schedule's section."""

    optimizer_config: CoreOptimizerConfig
    """The optimizer's section."""

    model: Any
    """The model's chunks."""


@dataclass
class OptimizerConfigOverrideProvider:
    """Chooses options for single parameters; subclass it to choose others."""

    def build_config_overrides(self, context: OptimizerConfigOverrideProviderContext) -> dict[Any, Any] | None:
        """Core's overrides for groups of parameters, as `get_megatron_optimizer(config_overrides=)` takes them.

        Here: Core's usual ones, no weight decay on biases and one-dimensional parameters, and decoupled_lr.
        """
        config = context.optimizer_config
        if context.scheduler_config.no_weight_decay_cond_type == "qwen3_next":
            config = copy.copy(config)
            config.apply_wd_to_qk_layernorm = True
        return get_standard_config_overrides(config)
