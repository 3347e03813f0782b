# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The formats of an offloaded optimizer's state in host memory: FP32, or BF16 for moments and gradients.

Core's options for them (`exp_avg_dtype`, `exp_avg_sq_dtype`, `main_grads_dtype`) never reach its hybrid optimizer.
They are handed to it here, after it is built. They change only what is stored: Adam computes in FP32
(`piecewise_adam.py`), and moments are rounded to nearest even when they are stored.

A checkpoint holds moments as they are stored if all of the optimizer is on the host. Else the part on the device has
FP32 moments, and a checkpoint has one format for a weight, so all are saved in FP32. Both hold the same values.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.utils.replaced import replaced

LOW_FORMATS = (torch.bfloat16,)
"""What can be stored instead of FP32. FP16 can't: second moments of usual gradients are below its smallest number."""


@dataclass(frozen=True)
class StateFormats:
    """Of what an offloaded optimizer keeps on the host."""

    exp_avg: torch.dtype = torch.float32
    exp_avg_sq: torch.dtype = torch.float32
    gradient: torch.dtype = torch.float32

    @property
    def are_fp32(self) -> bool:
        """Whether torch's Adam can step on the stored tensors themselves."""
        return self == FP32_STATE

    @property
    def moment_bytes(self) -> int:
        """Of both moments of one parameter."""
        return self.exp_avg.itemsize + self.exp_avg_sq.itemsize

    def __str__(self) -> str:
        names = {"first moments": self.exp_avg, "second moments": self.exp_avg_sq, "gradients": self.gradient}
        low = [f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in names.items() if dtype.itemsize < 4]
        return ", ".join(low)


FP32_STATE = StateFormats()


def formats_asked_for(config: OptimizerConfig) -> StateFormats:
    """The formats that a checked configuration asks for."""
    return StateFormats(config.exp_avg_dtype, config.exp_avg_sq_dtype, config.main_grads_dtype)


def formats_of(optimizer: torch.optim.Optimizer) -> StateFormats:
    """The formats of a hybrid optimizer's state on the host; FP32 if nobody has asked for others."""
    return vars(optimizer).get("formats", FP32_STATE)


def keep_state_in(hybrid: HybridDeviceOptimizer, formats: StateFormats) -> None:
    """Let a hybrid optimizer that has no state yet keep its state on the host in these formats.

    Raises:
        RuntimeError: Its step isn't the one in buckets, the only one that knows formats, or it has state already.
    """
    if formats.are_fp32:
        return
    if not hasattr(hybrid, "_buckets"):
        raise RuntimeError(
            f"{formats} on the host: {type(hybrid).__name__} doesn't step in buckets with this megatron-core; set "
            "optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype and optimizer.main_grads_dtype to float32"
        )
    if hybrid.state:
        raise RuntimeError("an optimizer's formats can't change after its first step")
    hybrid.formats = formats
    for bucket in hybrid._buckets:
        bucket.formats = formats


def saved_dtype(optimizer: torch.optim.Optimizer, key: str) -> torch.dtype:
    """The dtype of a kind of state (`exp_avg`, ...) in a checkpoint.

    Args:
        optimizer: What a distributed optimizer wraps: hybrid or not.
        key: Core's name of the state.
    """
    formats = formats_of(optimizer)
    is_all_on_host = getattr(optimizer, "offload_fraction", 0.0) == 1
    moments = {"exp_avg": formats.exp_avg, "exp_avg_sq": formats.exp_avg_sq}
    return moments.get(key, torch.float32) if is_all_on_host else torch.float32


@contextlib.contextmanager
def kept_by_loads(hybrid: HybridDeviceOptimizer) -> Iterator[None]:
    """Within the context, torch's `load_state_dict` leaves 16-bit state as it is.

    It would widen all of it to the masters' FP32, and so need twice its memory, before it is put into place.
    """
    stock = torch.optim.Optimizer._process_value_according_to_param_policy

    def policy(param: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        is_kept = param in hybrid.inner_param_to_orig_param and value.dtype in LOW_FORMATS
        return value if is_kept else stock(param, value, *arguments, **options)

    if formats_of(hybrid).are_fp32:
        yield
        return
    with replaced(torch.optim.Optimizer, _process_value_according_to_param_policy=policy):
        yield
