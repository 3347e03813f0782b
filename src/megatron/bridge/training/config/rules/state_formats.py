# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on the formats of the optimizer's state: which ones can be stored, and where."""

import torch

from megatron.bridge.training.config.optimizer import AUTO, PRECISION_AWARE_DTYPES
from megatron.bridge.training.config.sections import RunSections

_STORED_ON_HOST = ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
"""Core's options that the offloaded optimizer follows."""
_BETAS = {"exp_avg_dtype": "adam_beta1", "exp_avg_sq_dtype": "adam_beta2"}
SMALLEST_CHANGE = 2.0**-8
"""Relative. A smaller change of a BF16 number, which has 8 significant bits, may be rounded away."""


def check_offload_can_store_the_formats(cfg: RunSections, world_size: int) -> None:
    """The host's part of the optimizer stores moments and gradients in FP32 or BF16, and masters in FP32."""
    optimizer = cfg.optimizer
    if not optimizer.optimizer_cpu_offload or not optimizer.use_precision_aware_optimizer:
        return
    if optimizer.main_params_dtype != torch.float32:
        raise ValueError(
            f"optimizer.main_params_dtype={optimizer.main_params_dtype} with optimizer.optimizer_cpu_offload=true: "
            "the host's masters are FP32; set optimizer.main_params_dtype=float32"
        )
    for name in _STORED_ON_HOST:
        dtype = getattr(optimizer, name)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"optimizer.{name}={dtype} with optimizer.optimizer_cpu_offload=true: the host stores FP32 or BF16, "
                "since FP16 has no room for small moments, and 8 bits, rounded to nearest, would keep moments from "
                f"changing; set optimizer.{name}=bfloat16 or float32"
            )
        if dtype == torch.bfloat16 and optimizer.optimizer_streamed_fraction > 0:
            raise ValueError(
                f"optimizer.{name}={dtype} with optimizer.optimizer_streamed_fraction="
                f"{optimizer.optimizer_streamed_fraction}: the device steps on FP32 state alone; set "
                f"optimizer.{name}=float32 or optimizer.optimizer_streamed_fraction=0"
            )
        if dtype == torch.bfloat16 and optimizer.optimizer_offload_fraction == AUTO:
            raise ValueError(
                f"optimizer.{name}={dtype} with optimizer.optimizer_offload_fraction={AUTO}: it places FP32 state "
                f"alone; set optimizer.{name}=float32 or a number"
            )
        if dtype == torch.bfloat16 and optimizer.optimizer_offload_fraction == 0:
            raise ValueError(
                f"optimizer.{name}={dtype} with optimizer.optimizer_offload_fraction=0: nothing is on the host, and "
                f"the device's part keeps FP32; set optimizer.{name}=float32, or offload a part"
            )


def check_stored_moments_can_change(cfg: RunSections, world_size: int) -> None:
    """A moment in BF16 can only decay if a step changes it by more than half of BF16's spacing."""
    optimizer = cfg.optimizer
    if not optimizer.optimizer_cpu_offload:
        return
    for name, beta_name in _BETAS.items():
        beta = getattr(optimizer, beta_name)
        if getattr(optimizer, name) == torch.bfloat16 and 1 - beta < SMALLEST_CHANGE:
            raise ValueError(
                f"optimizer.{name}=bfloat16 with optimizer.{beta_name}={beta}: a step changes a moment by "
                f"{1 - beta:.2g} of its value, which BF16 rounds away; set optimizer.{beta_name} to 0.996 at most, or "
                f"optimizer.{name}=float32"
            )


def check_state_dtypes_need_precision_aware_mode(cfg: RunSections, world_size: int) -> None:
    """Only precision-aware mode keeps gradients, weights or moments in less than FP32."""
    if cfg.optimizer.use_precision_aware_optimizer:
        return
    for name in PRECISION_AWARE_DTYPES:
        dtype = getattr(cfg.optimizer, name)
        if dtype != torch.float32:
            raise ValueError(
                f"optimizer.{name}={dtype} without precision-aware mode: only float32 works; set "
                f"optimizer.{name}=float32 or optimizer.use_precision_aware_optimizer=true"
            )


def check_masters_can_be_split(cfg: RunSections, world_size: int) -> None:
    """Masters are stored as what BF16 weights on the device lack, and stepped on by the host's Adam."""
    optimizer, model = cfg.optimizer, cfg.model
    if not optimizer.optimizer_split_masters:
        return
    option, off = "optimizer.optimizer_split_masters=true", "set optimizer.optimizer_split_masters=false"
    fraction, streamed = optimizer.optimizer_offload_fraction, optimizer.optimizer_streamed_fraction
    keeps_fp8 = model.fp8_param or model.fp4_param or getattr(cfg.ddp, "fp8_param_gather", False)
    hindrances = {
        " without optimizer.optimizer_cpu_offload=true: no master is on the host": not optimizer.optimizer_cpu_offload,
        f" with optimizer.optimizer_offload_fraction={fraction}: no master is on the host": fraction == 0,
        f" with optimizer.optimizer_offload_fraction={AUTO}: it places FP32 state alone": fraction == AUTO,
        " without precision-aware mode: FP32 shards on the device follow FP32 masters; set "
        "optimizer.use_precision_aware_optimizer=true": not optimizer.use_precision_aware_optimizer,
        f" with optimizer.optimizer={optimizer.optimizer}: only adam steps in pieces": optimizer.optimizer != "adam",
        f" with optimizer.optimizer_streamed_fraction={streamed}: the device steps on FP32 state alone": streamed > 0,
        " with weights kept in FP8 or FP4: 16 bits of rest belong to 16 bits of weight": keeps_fp8,
        " with model.bf16=false: only BF16 has the exponent of FP32": not model.bf16,
    }
    for found, is_so in hindrances.items():
        if is_so:
            raise ValueError(f"{option}{found}; {'or ' if '; set' in found else ''}{off}")


STATE_FORMAT_RULES = (
    check_offload_can_store_the_formats,
    check_stored_moments_can_change,
    check_state_dtypes_need_precision_aware_mode,
    check_masters_can_be_split,
)
"""They follow the optimizer's rules."""
