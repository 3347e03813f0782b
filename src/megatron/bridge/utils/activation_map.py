# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Activation functions and number formats by name, for command lines and files."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu

__all__ = ["callable_to_str", "dtype_to_str", "str_to_callable", "str_to_dtype"]

_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "identity": torch.nn.Identity(),
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
    "fast_gelu": fast_gelu,
}
_OTHER_NAMES = {"swish": "silu", "swiglu": "silu", "geglu": "gelu", "relu2": "squared_relu"}
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}


def str_to_callable(name: str) -> Callable[..., torch.Tensor]:
    """The activation function of a name, such as "silu"; capital letters don't count.

    Raises:
        ValueError: There is none.
    """
    lower = name.strip().lower()
    known = _OTHER_NAMES.get(lower, lower)
    if known not in _FUNCTIONS:
        raise ValueError(f"activation function {name!r} is unknown: expected one of {', '.join(sorted(_FUNCTIONS))}")
    return _FUNCTIONS[known]


def callable_to_str(function: Callable[..., Any]) -> str:
    """The name that `str_to_callable` takes for a function.

    Raises:
        ValueError: It has none.
    """
    for name, known in _FUNCTIONS.items():
        if function is known:
            return name
    raise ValueError(f"{function!r} has no name here: expected one of {', '.join(sorted(_FUNCTIONS))}")


def str_to_dtype(name: str) -> torch.dtype:
    """The number format of a name: "bf16", "bfloat16", "torch.bfloat16" and the like.

    Raises:
        ValueError: torch has none of that name.
    """
    short = name.strip().lower().removeprefix("torch.")
    dtype = getattr(torch, _SHORT_DTYPES.get(short, short), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown: expected bf16, fp16, fp32, or torch's name of another")
    return dtype


def dtype_to_str(dtype: torch.dtype) -> str:
    """The name that `str_to_dtype` takes for a number format, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
