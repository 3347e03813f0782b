# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the precision section; `megatron.bridge.training.config.mixed_precision` defines it."""

from megatron.bridge.training.config.mixed_precision import (
    MixedPrecisionConfig,
    bf16_mixed,
    bf16_with_fp8_current_scaling_mixed,
    bf16_with_fp8_delayed_scaling_mixed,
    bf16_with_fp8_subchannel_scaling_mixed,
    bf16_with_mxfp8_mixed,
    bf16_with_nvfp4_mixed,
    fp16_mixed,
    fp32,
    get_mixed_precision_config,
    is_mixed_precision,
    name_of_preset,
    register,
)

__all__ = [
    "MixedPrecisionConfig",
    "bf16_mixed",
    "bf16_with_fp8_current_scaling_mixed",
    "bf16_with_fp8_delayed_scaling_mixed",
    "bf16_with_fp8_subchannel_scaling_mixed",
    "bf16_with_mxfp8_mixed",
    "bf16_with_nvfp4_mixed",
    "fp16_mixed",
    "fp32",
    "get_mixed_precision_config",
    "is_mixed_precision",
    "name_of_preset",
    "register",
]
