# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How a Megatron weight is put together from Hugging Face tensors: tables of slices, no tensor in sight.

A Megatron weight, its tensor-parallel shards laid end to end along one axis, is a sequence of *segments*: slices of
Hugging Face tensors along the same axis. One rank's shard is an even part of that sequence. This one description
serves both directions: import copies each slice into its place, export copies it back, and both are exact.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol


class ModelSizes(Protocol):
    """The part of a provider that layouts need; counts and lengths over all ranks."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    share_embeddings_and_output_weights: bool


@dataclass(frozen=True)
class Segment:
    """A slice of a Hugging Face tensor along the split axis; `hf_name` None stands for padding."""

    hf_name: str | None
    start: int
    length: int


Layout = Callable[[ModelSizes, int, tuple[str, ...], int], list[Segment]]
"""(sizes, tensor-parallel size, Hugging Face names, full length) -> the segments of the whole weight."""


@dataclass(frozen=True)
class WeightMapping:
    """One Megatron weight, or one in every layer or expert, and the Hugging Face tensors it is made of.

    Names may hold `{layer}`, the layer's number from 0 over all pipeline stages, and `{expert}`, the expert's number
    from 0 over all expert-parallel ranks.
    """

    megatron_name: str
    hf_names: tuple[str, ...]
    layout: Layout
    dim: int | None
    """The axis that tensor parallelism splits; None: every rank holds the whole weight."""
    rows: tuple[str, ...] = ()
    """Of a weight that some layers split and others hold whole on every rank: sizes that add up to its rows."""
    differs_by_layer: bool = False
    """Whether the sizes are those that a layer has of its own, `of_layer` of the provider."""
    layer: int | None = None
    """The layer's number, once it is filled in."""

    @property
    def is_vocabulary(self) -> bool:
        """Whether the weight has one row a token."""
        return self.layout is _padded_vocabulary

    @property
    def is_expert(self) -> bool:
        """Whether the weight is one expert's: shared out by expert parallelism, split by expert-tensor parallelism."""
        return ".experts." in self.megatron_name

    def at_layer(self, layer: int | None, expert: int | None = None) -> "WeightMapping":
        """The same mapping with the numbers of the layer and the expert filled in."""

        def filled(name: str) -> str:
            return name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

        hf_names = tuple(map(filled, self.hf_names))
        return replace(self, megatron_name=filled(self.megatron_name), hf_names=hf_names, layer=layer)

    def as_held(self, sizes: Any, rows: int) -> "WeightMapping":
        """The same mapping, not split where a rank holds all rows of a weight that needn't be.

        A layer's query, key and value are two tensors where keys are values too, and one where they are another's.
        """
        if self.differs_by_layer:
            return replace(self, hf_names=self.hf_names[: 1 + self._own(sizes).num_kv_projections])
        is_whole = bool(self.rows) and sum(getattr(sizes, name) for name in self.rows) == rows
        return replace(self, dim=None) if is_whole else self

    def segments(self, sizes: ModelSizes, tensor_parallel_size: int, full_length: int) -> list[Segment]:
        """The segments of the whole weight, whose length along the split axis is `full_length`."""
        return self.layout(self._own(sizes), tensor_parallel_size, self.hf_names, full_length)

    def _own(self, sizes: Any) -> Any:
        """The sizes of its layer."""
        if not self.differs_by_layer:
            return sizes
        assert self.layer is not None, "at_layer comes first"
        return sizes.of_layer(self.layer + 1)


def shard(segments: Iterable[Segment], start: int, length: int) -> list[tuple[int, Segment]]:
    """The part of a sequence of segments that lies within `[start, start + length)`.

    Returns:
        (offset within the part, segment) pairs.
    """
    parts = []
    position = 0
    for segment in segments:
        first = max(position, start)
        last = min(position + segment.length, start + length)
        if first < last:
            cut = Segment(segment.hf_name, segment.start + first - position, last - first)
            parts.append((first - start, cut))
        position += segment.length
    return parts


def hf_lengths(segments: Iterable[Segment]) -> dict[str, int]:
    """The length of each Hugging Face tensor along the split axis, as its segments add up."""
    lengths: dict[str, int] = {}
    for segment in segments:
        if segment.hf_name is not None:
            lengths[segment.hf_name] = lengths.get(segment.hf_name, 0) + segment.length
    return lengths


def replicated(megatron_name: str, hf_name: str) -> WeightMapping:
    """A weight that every tensor-parallel rank holds whole, such as a norm's."""
    return WeightMapping(megatron_name, (hf_name,), _one_tensor, dim=None)


def split_rows(megatron_name: str, hf_name: str) -> WeightMapping:
    """A matrix, or a bias, whose output features are split (Core's column-parallel layers)."""
    return WeightMapping(megatron_name, (hf_name,), _one_tensor, dim=0)


def split_rows_or_whole(megatron_name: str, hf_name: str, *, rows: tuple[str, ...]) -> WeightMapping:
    """A matrix that Core's own layers split by rows, and that each rank holds whole in Transformer Engine's."""
    return WeightMapping(megatron_name, (hf_name,), _one_tensor, dim=0, rows=rows)


def split_columns(megatron_name: str, hf_name: str) -> WeightMapping:
    """A matrix whose input features are split (Core's row-parallel layers)."""
    return WeightMapping(megatron_name, (hf_name,), _one_tensor, dim=1)


def vocabulary(megatron_name: str, hf_name: str) -> WeightMapping:
    """A matrix with one row a token, padded at the end."""
    return WeightMapping(megatron_name, (hf_name,), _padded_vocabulary, dim=0)


def fused_qkv(megatron_name: str, *, q: str, k: str, v: str) -> WeightMapping:
    """Query, key and value in one matrix, or bias: for each query group its heads' queries, its key, its value."""
    return WeightMapping(megatron_name, (q, k, v), _grouped_qkv, dim=0)


def fused_qkv_of_layer(megatron_name: str, *, q: str, k: str, v: str) -> WeightMapping:
    """As `fused_qkv`, of layers whose sizes differ, and that may lack a value, or a key too."""
    return WeightMapping(megatron_name, (q, k, v), _grouped_qkv, dim=0, differs_by_layer=True)


def fused_gate_up(megatron_name: str, *, gate: str, up: str) -> WeightMapping:
    """A gated MLP's two input matrices in one: on each tensor-parallel rank its gate rows, then its up rows."""
    return WeightMapping(megatron_name, (gate, up), _gate_up_by_rank, dim=0)


def qkv_in_one(megatron_name: str, qkv: str) -> WeightMapping:
    """Query, key and value in one matrix, or bias, in files too: all queries, all keys, all values."""
    return WeightMapping(megatron_name, (qkv,), _qkv_in_one, dim=0)


def gate_up_in_one(megatron_name: str, gate_up: str) -> WeightMapping:
    """A gated MLP's two input matrices in one in files too: all gate rows, then all up rows."""
    return WeightMapping(megatron_name, (gate_up,), _gate_up_in_one, dim=0)


def _one_tensor(sizes: ModelSizes, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    return [Segment(names[0], 0, full_length)]


def _padded_vocabulary(sizes: ModelSizes, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    padding = [Segment(None, 0, full_length - sizes.vocab_size)] if full_length > sizes.vocab_size else []
    return [Segment(names[0], 0, sizes.vocab_size), *padding]


def _grouped_qkv(sizes: ModelSizes, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    q, *k_and_v = names
    kv_rows = sizes.kv_channels
    q_rows = kv_rows * (sizes.num_attention_heads // sizes.num_query_groups)
    return [
        segment
        for group in range(sizes.num_query_groups)
        for segment in (
            Segment(q, group * q_rows, q_rows),
            *(Segment(name, group * kv_rows, kv_rows) for name in k_and_v),
        )
    ]


def _gate_up_by_rank(sizes: ModelSizes, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    rows = full_length // (2 * ranks)
    return [Segment(name, rank * rows, rows) for rank in range(ranks) for name in names]


def _qkv_in_one(sizes: ModelSizes, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    parts = ("q", "k", "v")
    segments = _grouped_qkv(sizes, ranks, parts, full_length)
    return _one_after_the_other(segments, parts, names[0])


def _gate_up_in_one(sizes: ModelSizes, ranks: int, names: tuple[str, ...], full_length: int) -> list[Segment]:
    parts = ("gate", "up")
    return _one_after_the_other(_gate_up_by_rank(sizes, ranks, parts, full_length), parts, names[0])


def _one_after_the_other(segments: list[Segment], parts: tuple[str, ...], name: str) -> list[Segment]:
    """The same segments, of one tensor in which the parts follow each other."""
    lengths = hf_lengths(segments)
    first = {part: sum(lengths[before] for before in parts[:index]) for index, part in enumerate(parts)}
    return [Segment(name, first[str(one.hf_name)] + one.start, one.length) for one in segments]
