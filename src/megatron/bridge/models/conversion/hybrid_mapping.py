# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rows of a table for gated attention and for Gated DeltaNet layers, whose tensors are cut by heads."""

from typing import Any, NamedTuple

from megatron.bridge.models.conversion.mapping import Segment, WeightMapping


def fused_gated_qkv(megatron_name: str, *, q: str, k: str, v: str) -> WeightMapping:
    """Query, gate, key and value in one matrix: for each query group its heads' queries, their gates, its key, value.

    The tensor `q` has for each head its query, then its gate.
    """
    return WeightMapping(megatron_name, (q, k, v), _gated_qkv, dim=0)


def _gated_qkv(sizes: Any, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    q, k, v = names
    rows, heads = sizes.kv_channels, sizes.num_attention_heads // sizes.num_query_groups
    found = []
    for group in range(sizes.num_query_groups):
        for gate in (0, 1):
            found += [Segment(q, (2 * (group * heads + head) + gate) * rows, rows) for head in range(heads)]
        found += [Segment(k, group * rows, rows), Segment(v, group * rows, rows)]
    return found


class _KeyHeads(NamedTuple):
    """The rows of each key head."""

    number: int
    key: int
    """Of its key, and of its query."""
    values: int
    """Of all its values, and of their gates."""
    value_heads: int
    """Of their betas, and of their decays."""

    @classmethod
    def of(cls, sizes: Any) -> "_KeyHeads":
        number = sizes.linear_num_key_heads
        value_heads = sizes.linear_num_value_heads // number
        return cls(number, sizes.linear_key_head_dim, value_heads * sizes.linear_value_head_dim, value_heads)

    def convolved(self, name: str, head: int) -> list[Segment]:
        """Query, key and values of a head in a tensor that has all queries, all keys, then all values."""
        keys = self.number * self.key
        return [
            Segment(name, head * self.key, self.key),
            Segment(name, keys + head * self.key, self.key),
            Segment(name, 2 * keys + head * self.values, self.values),
        ]


def delta_net_channels(megatron_name: str, hf_name: str) -> WeightMapping:
    """A weight of the channels that are convolved."""
    return WeightMapping(megatron_name, (hf_name,), _channels, dim=0)


def delta_net_in_proj(megatron_name: str, *, qkvz: str, ba: str) -> WeightMapping:
    """The input projection, of tensors that have for each key head query, key, values and gates, betas and decays."""
    return WeightMapping(megatron_name, (qkvz, ba), _by_head, dim=0)


def delta_net_split_in_proj(megatron_name: str, *, qkv: str, z: str, b: str, a: str) -> WeightMapping:
    """The input projection, of tensors that have all queries, keys and values; gates; betas; decays."""
    return WeightMapping(megatron_name, (qkv, z, b, a), _by_part, dim=0)


def _channels(sizes: Any, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    heads = _KeyHeads.of(sizes)
    return [segment for head in range(heads.number) for segment in heads.convolved(names[0], head)]


def _by_head(sizes: Any, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    heads = _KeyHeads.of(sizes)
    rows = 2 * heads.key + 2 * heads.values, 2 * heads.value_heads
    return [
        Segment(name, head * length, length)
        for head in range(heads.number)
        for name, length in zip(names, rows, strict=True)
    ]


def _by_part(sizes: Any, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    heads = _KeyHeads.of(sizes)
    qkv, *others = names
    rows = heads.values, heads.value_heads, heads.value_heads
    found = []
    for head in range(heads.number):
        found += heads.convolved(qkv, head)
        found += [Segment(name, head * length, length) for name, length in zip(others, rows, strict=True)]
    return found
