# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import pytest

from megatron.bridge.models.conversion.mapping import (
    Segment,
    fused_gate_up,
    fused_qkv,
    gate_up_in_one,
    hf_lengths,
    qkv_in_one,
    replicated,
    shard,
    split_columns,
    split_rows,
    split_rows_or_whole,
    vocabulary,
)

SIZES = SimpleNamespace(
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=10,
    share_embeddings_and_output_weights=False,
)
QKV = fused_qkv("qkv", q="q", k="k", v="v")


def test_qkv_lays_each_group_end_to_end():
    assert QKV.segments(SIZES, 1, 48) == [
        Segment("q", 0, 16),
        Segment("k", 0, 4),
        Segment("v", 0, 4),
        Segment("q", 16, 16),
        Segment("k", 4, 4),
        Segment("v", 4, 4),
    ]


def test_gate_and_up_alternate_by_rank():
    assert fused_gate_up("fc1", gate="g", up="u").segments(SIZES, 2, 48) == [
        Segment("g", 0, 12),
        Segment("u", 0, 12),
        Segment("g", 12, 12),
        Segment("u", 12, 12),
    ]


def test_what_files_have_in_one_tensor_too_is_taken_from_where_its_parts_begin():
    assert qkv_in_one("qkv", "one").segments(SIZES, 2, 48) == [
        Segment("one", 0, 16),
        Segment("one", 32, 4),
        Segment("one", 40, 4),
        Segment("one", 16, 16),
        Segment("one", 36, 4),
        Segment("one", 44, 4),
    ]
    assert gate_up_in_one("fc1", "one").segments(SIZES, 2, 48) == [
        Segment("one", 0, 12),
        Segment("one", 24, 12),
        Segment("one", 12, 12),
        Segment("one", 36, 12),
    ]


def test_vocabulary_ends_in_padding():
    assert vocabulary("e", "embed").segments(SIZES, 2, 12) == [Segment("embed", 0, 10), Segment(None, 0, 2)]
    assert vocabulary("e", "embed").segments(SIZES, 1, 10) == [Segment("embed", 0, 10)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("mapping", "full_length"),
    [
        (QKV, 48),
        (fused_gate_up("fc1", gate="g", up="u"), 48),
        (vocabulary("e", "embed"), 16),
        (qkv_in_one("qkv", "qkv"), 48),
        (gate_up_in_one("fc1", "gu"), 48),
    ],
)
def test_shards_hold_every_row_exactly_once(mapping, full_length, ranks):
    """Also where there are more ranks than query groups, whose shards cut through a group."""
    segments = mapping.segments(SIZES, ranks, full_length)
    assert sum(segment.length for segment in segments) == full_length
    rows: dict[str, list[int]] = {}
    for rank in range(ranks):
        length = full_length // ranks
        position = 0
        for offset, segment in shard(segments, rank * length, length):
            assert offset == position
            position += segment.length
            if segment.hf_name is not None:
                rows.setdefault(segment.hf_name, []).extend(range(segment.start, segment.start + segment.length))
        assert position == length
    assert {name: sorted(held) for name, held in rows.items()} == {
        name: list(range(length)) for name, length in hf_lengths(segments).items()
    }


def test_layer_number_is_filled_in():
    mapping = split_columns("decoder.layers.{layer}.w", "model.layers.{layer}.w").at_layer(7)
    assert (mapping.megatron_name, mapping.hf_names, mapping.dim) == ("decoder.layers.7.w", ("model.layers.7.w",), 1)
    assert replicated("a", "b").at_layer(None).megatron_name == "a"


def test_expert_number_is_filled_in():
    mapping = split_columns("layers.{layer}.mlp.experts.linear_fc2.weight{expert}", "{layer}.{expert}.down")
    assert mapping.is_expert and not replicated("decoder.layers.{layer}.mlp.router.weight", "gate").is_expert
    filled = mapping.at_layer(3, 12)
    assert (filled.megatron_name, filled.hf_names) == ("layers.3.mlp.experts.linear_fc2.weight12", ("3.12.down",))


def test_a_weight_that_a_rank_holds_whole_is_not_split():
    """As Transformer Engine's layers hold what projects down, and Core's own layers don't."""
    mapping = split_rows_or_whole("down", "hf.down", rows=("rank", "turning"))
    sizes = SimpleNamespace(rank=5, turning=3)
    assert (mapping.as_held(sizes, 8).dim, mapping.as_held(sizes, 4).dim) == (None, 0)
    assert split_rows("other", "hf.other").as_held(sizes, 8).dim == 0
