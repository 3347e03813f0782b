# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Scaling of the rotary position frequencies as in Llama 3.1 and later."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Llama3RopeScaling:
    """How Llama 3 stretches the rotary frequencies to positions beyond those it was pretrained on."""

    factor: float
    """How many times longer the slow frequencies become."""
    low_freq_factor: float
    """A frequency that turns fewer times than this within the original length is stretched in full."""
    high_freq_factor: float
    """A frequency that turns more times than this within the original length stays as it is."""
    original_max_position_embeddings: int
    """Length pretrained on, in tokens."""

    def scale(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Scale inverse frequencies.

        Args:
            inv_freq: Radians per token, float32 [D / 2], any device.

        Returns:
            The scaled frequencies: same shape, dtype and device.
        """
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)
        weight = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - weight) * inv_freq / self.factor + weight * inv_freq
        stretched = torch.where(turns < self.low_freq_factor, inv_freq / self.factor, blended)
        return torch.where(turns > self.high_freq_factor, inv_freq, stretched)
