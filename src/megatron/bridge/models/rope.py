# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Scalings of the rotary position frequencies: as in Llama 3.1 and later, and YaRN (arXiv 2309.00071)."""

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


@dataclass(frozen=True)
class YarnRopeScaling:
    """How YaRN stretches the rotary frequencies: the slow ones in full, the fast ones not at all."""

    factor: float
    """How many times longer the slow frequencies become."""
    original_max_position_embeddings: int
    """Length pretrained on, in tokens."""
    beta_fast: float
    """A frequency that turns more times than this within the original length stays as it is."""
    beta_slow: float
    """A frequency that turns fewer times than this within the original length is stretched in full."""
    round_to_int: bool
    """Whether the channels at which these begin are rounded to whole ones, outwards."""

    def frequencies(self, channels: int, base: float, device: torch.device) -> torch.Tensor:
        """The scaled inverse frequencies, in the order of operations of transformers, so that they are bit-exact.

        Args:
            channels: Channels of a head that turn, an even number D.
            base: Base of the rotary frequencies.
            device: Where the result lies.

        Returns:
            Radians per token, float32 [D / 2].
        """
        periods = base ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
        first, last = self._ramp(channels, base)
        stretched = ((torch.arange(channels // 2, dtype=torch.float32, device=device) - first) / (last - first)).clamp(
            0, 1
        )
        as_is = 1 - stretched
        return (1.0 / (self.factor * periods)) * (1 - as_is) + (1.0 / periods) * as_is

    def _ramp(self, channels: int, base: float) -> tuple[float, float]:
        """The channels between which frequencies pass from unscaled to stretched in full."""

        def channel_that_turns(times: float) -> float:
            length = self.original_max_position_embeddings
            return channels * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

        first, last = channel_that_turns(self.beta_fast), channel_that_turns(self.beta_slow)
        if self.round_to_int:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, channels - 1)
        return first, last + 0.001 if first == last else last


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What cosine and sine are multiplied by, as Core reckons it from `yarn_rotary_scaling_factor` and both mscales."""
    if mscale is None or mscale_all_dim is None:
        return yarn_mscale(factor, 1.0)
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)


def yarn_mscale(factor: float, weight: float) -> float:
    """How much YaRN of a factor scales attention, by the weight that a model gives it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def mscale_of_attention_factor(factor: float, attention_factor: float) -> float:
    """The `yarn_mscale` that, with `yarn_mscale_all_dim` 0, gives cosine and sine this factor; `factor` is above 1."""
    return (attention_factor - 1) / (0.1 * math.log(factor))
