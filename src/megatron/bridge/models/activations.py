# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Activation functions that Core lacks, by a name that a configuration file can hold."""

import torch
import torch.nn.functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The approximation of GELU by tanh, in torch's own kernel. Core's `fast_gelu` is compiled at its first call."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """The approximation of GELU by a sigmoid. Core's is compiled at its first call."""
    return x * torch.sigmoid(1.702 * x)
