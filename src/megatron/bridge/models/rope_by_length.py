# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rotary frequencies that depend on a sequence's length: dynamic NTK and LongRoPE (arXiv 2402.13753), as transformers.

The length is the largest position of the forward pass, plus 1. Of packed samples, that is the length of the longest.

Shapes: B batch, S sequence, D channels of a head that turn.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

BY_LENGTH = ("dynamic", "longrope")
"""The values of `model.position_embedding_type` that are here."""


@dataclass(frozen=True)
class DynamicRopeScaling:
    """A longer sequence gets a larger base, from a length on."""

    factor: float
    """How much faster than the length the base grows."""
    max_position_embeddings: int
    """Longest sequence without scaling, in tokens."""

    def key(self, length: int) -> int:
        """Lengths of one key have the same frequencies."""
        return max(length, self.max_position_embeddings)

    def frequencies(self, channels: int, base: float, length: int, device: torch.device) -> torch.Tensor:
        """The inverse frequencies of sequences of a length, in transformers' order of operations: bit-exact.

        Args:
            channels: D.
            base: Base of the rotary frequencies.
            length: In tokens.
            device: Where the result lies.

        Returns:
            Radians per token, float32 [D / 2].
        """
        longest: Any = self.max_position_embeddings
        seq_len: Any = longest if length <= longest else torch.tensor(length, device=device)  # rounds as transformers
        grown = base * ((self.factor * seq_len / longest) - (self.factor - 1)) ** (channels / (channels - 2))
        return 1.0 / (grown ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels))


@dataclass(frozen=True)
class LongRopeScaling:
    """Each frequency has a factor in short sequences, and another in long ones."""

    short_factor: Sequence[float]
    """Of each frequency, in sequences up to the length pretrained on."""
    long_factor: Sequence[float]
    """Of each frequency, in longer ones."""
    original_max_position_embeddings: int
    """Length pretrained on, in tokens."""

    def key(self, length: int) -> bool:
        """Lengths of one key have the same frequencies."""
        return length > self.original_max_position_embeddings

    def frequencies(self, channels: int, base: float, length: int, device: torch.device) -> torch.Tensor:
        """As `DynamicRopeScaling.frequencies`."""
        factors = self.long_factor if self.key(length) else self.short_factor
        exponents = torch.arange(0, channels, 2, dtype=torch.int64, device=device).float() / channels
        return 1.0 / (torch.tensor(list(factors), dtype=torch.float32, device=device) * base**exponents)


def longrope_attention_factor(factor: float, original_max_position_embeddings: int) -> float:
    """What cosine and sine are multiplied by where a model doesn't say it; `factor` is the longest length by it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))


class RotaryByLength(torch.nn.Module):
    """Rotary positions in place of a model's `rotary_pos_emb`, with the frequencies of each sequence's length.

    Args:
        plain: The model's own, without scaling.
        scaling: The frequencies.
        base: Base of the rotary frequencies.
    """

    def __init__(self, plain: RotaryEmbedding, scaling: DynamicRopeScaling | LongRopeScaling, *, base: float) -> None:
        super().__init__()
        self.scaling, self.base = scaling, base
        self.position_ids: torch.Tensor | None = None
        self.get_rotary_seq_len = plain.get_rotary_seq_len
        self._plain = plain
        self._last: tuple[Any, RotaryEmbedding] | None = None

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The angles [S, 1, 1, D]. Arguments as for `RotaryEmbedding`."""
        return self._of(self._length(max_seq_len, kwargs.get("cp_group")))(max_seq_len, *args, **kwargs)

    def _length(self, max_seq_len: int, cp_group: Any) -> int:
        """The length that the frequencies are for; `max_seq_len` is the row's, or that of the cache."""
        if self.position_ids is None or self.scaling.key(max_seq_len) == self.scaling.key(0):
            return max_seq_len
        last = self.position_ids.max()
        cp_group = cp_group or self._plain.cp_group
        if cp_group is not None and cp_group.size() > 1:  # each rank has the positions of a part
            dist.all_reduce(last, op=dist.ReduceOp.MAX, group=cp_group)
        return int(last) + 1

    def _of(self, length: int) -> RotaryEmbedding:
        key = self.scaling.key(length)
        if self._last is None or self._last[0] != key:
            positions, plain = copy.copy(self._plain), self._plain.inv_freq
            positions.inv_freq = self.scaling.frequencies(2 * plain.numel(), self.base, length, plain.device)
            self._last = key, positions
        return self._last[1]


def scale_by_length(model: Any, config: Any) -> None:
    """Give a model rotary positions that depend on the length of what it reads.

    Args:
        model: A bare chunk of a `GPTModel` with plain rotary positions.
        config: The provider.
    """
    positions = RotaryByLength(model.rotary_pos_emb, scaling_by_length(config), base=config.rotary_base)
    model.rotary_pos_emb = positions
    keep_position_ids(model, positions)


def keep_position_ids(model: Any, positions: Any) -> None:
    """Before each forward pass of a model, let `positions.position_ids` be those of its tokens, [B, S] or None.

    Args:
        model: A bare chunk of a `GPTModel`.
        positions: What stands in for its `rotary_pos_emb`.
    """

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions.position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    model.register_forward_pre_hook(keep, with_kwargs=True)


def scaling_by_length(config: Any) -> DynamicRopeScaling | LongRopeScaling:
    """The scaling of a provider whose `position_embedding_type` is one of `BY_LENGTH`.

    Raises:
        ValueError: LongRoPE's factors are missing, or not one for each frequency.
    """
    if config.position_embedding_type == "dynamic":
        return DynamicRopeScaling(config.dynamic_rope_factor, config.dynamic_rope_max_position_embeddings)
    frequencies = int(config.kv_channels * config.rotary_percent) // 2
    for name in ("longrope_short_factor", "longrope_long_factor"):
        found = getattr(config, name)
        if len(found or ()) != frequencies:
            raise ValueError(
                f"model.{name} has {len(found or ())} numbers: expected {frequencies}, one for each two of the "
                "channels that turn"
            )
    short, long = config.longrope_short_factor, config.longrope_long_factor
    return LongRopeScaling(tuple(short), tuple(long), config.longrope_original_max_position_embeddings)


def reads_again(config: Any) -> Callable[[int, int], bool]:
    """Whether keys in a cache are turned by other frequencies than the same keys in a longer sequence.

    Args:
        config: The provider.

    Returns:
        A function of the tokens in the cache and the tokens of the sequence.
    """
    if config.position_embedding_type not in BY_LENGTH:
        return lambda cached, length: False
    scaling = scaling_by_length(config)
    return lambda cached, length: scaling.key(cached) != scaling.key(length)
