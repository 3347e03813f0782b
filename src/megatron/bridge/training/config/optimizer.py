# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on the optimizer, which Megatron-Core owns, and options for single parameters.

Core checks its classes as they are made, before overrides and mixed precision apply. Our subclasses check in
`finalize()`, which can be called again at any time.
"""

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_standard_config_overrides, optimizer_config
from megatron.core.utils import get_te_version

from megatron.bridge.peft.lora_plus import get_lora_plus_config_overrides, is_b_matrix
from megatron.bridge.training.config.scheduler import SchedulerConfig
from megatron.bridge.utils.distributed import all_gathered
from megatron.bridge.utils.replaced import replaced
from megatron.bridge.utils.section import open_to_all_names
from megatron.bridge.utils.set_fields import RemembersSetFields, writes_that_nobody_set

PRECISION_AWARE_DTYPES = ("main_params_dtype", "main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
"""Core's options that only precision-aware mode follows; FP32 in all others."""


def _absent_transformer_engine_is_old() -> AbstractContextManager[None]:
    """While Core checks its options: a Transformer Engine that is not installed is older than any version.

    A repair: Core 0.16.1 asks for its version in precision-aware mode, also where the optimizer is offloaded and uses
    none of it, and compares the version that isn't there (TypeError). Core 0.19.2 answers.
    """
    stock = optimizer_config.is_te_min_version

    def is_te_min_version(*args: Any, **kwargs: Any) -> bool:
        return get_te_version() is not None and stock(*args, **kwargs)

    return replaced(optimizer_config, is_te_min_version=is_te_min_version)


AUTO = "auto"
"""The offload fraction that a run settles by itself, once, before its first step."""


@dataclass
class OptimizerConfig(RemembersSetFields, CoreOptimizerConfig):
    """Megatron-Core's optimizer options, checked in `finalize()` instead of at birth."""

    optimizer_offload_fraction: float | str = 0.0
    """Part of the optimizer, 0 to 1, that lives on the host. "auto": this and `optimizer_streamed_fraction` are chosen
    before the first step, such that the optimizer takes the least time within the device's memory; a resume keeps what
    the saved run chose."""

    optimizer_device_memory_gib: float | None = None
    """For `optimizer_offload_fraction="auto"`: device memory that the run may use, in GiB, without CUDA's and NCCL's
    own. None: all that is free once the model is built."""

    optimizer_cpu_num_threads: int | None = None
    """Threads that the offloaded part of a step runs with, on each rank. None: the rank's share of the machine's cores,
    whatever torchrun set; where the device is simulated, as many as the process has."""

    optimizer_streamed_fraction: float = 0.0
    """Part of the offloaded optimizer, 0 to 1 in whole buckets, that the device steps on: its state lives on the host
    and passes through the device in each step. Bit-exact with the run without offload."""
    # With optimizer_cpu_offload, Core's exp_avg_dtype, exp_avg_sq_dtype and main_grads_dtype (float32 or bfloat16, in
    # precision-aware mode) are what the host stores; see docs/training/cpu-offload.md.

    optimizer_split_masters: bool = False
    """Whether the host stores masters as the 16 bits that BF16 weights lack, instead of in FP32. Bit-exact. The weights
    come down in each step. Needs precision-aware mode."""

    overlap_cpu_optimizer_step: bool = False
    """Whether the offloaded part of a step runs on the host while the next forward pass begins: each layer waits for
    its own weights. Bit-exact with the step that doesn't. Needs `overlap_cpu_optimizer_d2h_h2d`."""

    def __post_init__(self) -> None:
        """Do nothing yet: overrides and mixed precision come first."""

    def finalize(self) -> None:
        """Run Core's checks and let it derive its own flags.

        Raises:
            ValueError: naming the option that can't work.
        """
        open_to_all_names(self)
        try:
            with _absent_transformer_engine_is_old(), writes_that_nobody_set(self):
                super().__post_init__()
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"optimizer: {error}") from error


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
        overrides = get_standard_config_overrides(config)
        for override in overrides.values():
            if "max_lr" in override:
                override["is_decoupled_lr"] = True  # up to 0.16.1 Core matches a checkpoint's groups by this alone
        return overrides


@dataclass
class LoRAPlusOverrideProvider(OptimizerConfigOverrideProvider):
    """LoRA+: B of each adapter learns faster than A."""

    lr_ratio: float = 16.0
    """How many times `optimizer.lr` the learning rate of B is."""

    def build_config_overrides(self, context: OptimizerConfigOverrideProviderContext) -> dict[Any, Any] | None:
        """See `OptimizerConfigOverrideProvider.build_config_overrides`. Collective.

        Raises:
            ValueError: No rank's model has adapters, or the rates can't be right.
        """
        names = (name for chunk in context.model for name, _ in chunk.named_parameters())
        if not any(all_gathered(any(map(is_b_matrix, names)))):
            raise ValueError(
                "optimizer_config_override_provider is a LoRAPlusOverrideProvider, and the model has no adapters: "
                "expected peft to be a LoRA, CanonicalLoRA or DoRA; set it, or unset the provider"
            )
        overrides = super().build_config_overrides(context) or {}
        return overrides | get_lora_plus_config_overrides(context.optimizer_config, self.lr_ratio)
