# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Paths beside the parts of a fused layer compute what peft computes beside the layers that it is made of."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.fused_adapter import FusedAdapter
from megatron.bridge.peft.linear_layout import LinearLayout

GROUPS, HEADS, HEAD, HIDDEN = 2, 6, 4, 8
OPTIONS = CanonicalLoRA(dim=3, alpha=6, lora_B_init_method="normal")


def _layer(fused: str) -> tuple[torch.nn.Module, LinearLayout]:
    rows = (HEADS + 2 * GROUPS) * HEAD if fused == "linear_qkv" else 20
    linear = torch.nn.Linear(HIDDEN, rows, bias=False)
    linear.config = SimpleNamespace(num_query_groups=GROUPS, num_attention_heads=HEADS, kv_channels=HEAD)
    layout = LinearLayout(
        split="output",
        group=SimpleNamespace(size=lambda: 1, rank=lambda: 0),
        sequence_parallel=False,
        is_bare=False,
        is_gated=fused == "linear_fc1",
        adds_bias=False,
        normalized=None,
    )
    return linear, layout


def _rows_of_parts(fused: str) -> dict[str, list[int]]:
    """Where Core keeps each part's rows, in Hugging Face's order."""
    if fused == "linear_fc1":
        return {"gate": list(range(10)), "up": list(range(10, 20))}
    rows = {"q": [], "k": [], "v": []}
    position = 0
    for _ in range(GROUPS):
        for part, count in (("q", HEADS // GROUPS * HEAD), ("k", HEAD), ("v", HEAD)):
            rows[part] += range(position, position + count)
            position += count
    return rows


@pytest.mark.parametrize("fused, parts", [("linear_qkv", "qkv"), ("linear_qkv", "qv"), ("linear_fc1", ["up", "gate"])])
def test_each_part_has_the_update_of_its_own_path(fused, parts):
    linear, layout = _layer(fused)
    adapter = FusedAdapter(linear, layout, OPTIONS, f"layers.0.{fused}", parts=parts)
    x = torch.randn(5, 2, HIDDEN)
    expected = linear.weight.detach().clone()
    for part, rows in _rows_of_parts(fused).items():
        if part in parts:
            path = getattr(adapter, f"adapter_{part}")
            expected[rows] += 2 * path.linear_out.weight.detach() @ path.linear_in.weight.detach()
    torch.testing.assert_close(adapter.merged(linear), expected)
    torch.testing.assert_close(adapter(linear, x, linear(x)), x @ expected.T)
    first, second = (getattr(adapter, f"adapter_{part}").linear_in.weight for part in list(parts)[:2])
    assert not torch.equal(first, second), "each part has an A of its own"


def test_what_isnt_made_of_these_parts_is_refused():
    linear, layout = _layer("linear_qkv")
    linear.config.kv_channels = 3
    with pytest.raises(ValueError, match="layers.0.linear_qkv has 40 rows: expected 30, those of query, key and value"):
        FusedAdapter(linear, layout, OPTIONS, "layers.0.linear_qkv", parts="q")
    on_three_ranks = replace(layout, group=SimpleNamespace(size=lambda: 3, rank=lambda: 0))
    with pytest.raises(ValueError, match="layers.0.linear_qkv has 2 query groups on 3 ranks: each rank needs whole"):
        FusedAdapter(linear, on_three_ranks, OPTIONS, "layers.0.linear_qkv", parts="q")
    with pytest.raises(ValueError, match="layers.0.linear_fc1 has no gate: expected a gated MLP"):
        FusedAdapter(linear, layout, OPTIONS, "layers.0.linear_fc1", parts=["up"])


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_fused_layer_is_named_by_its_parts(option):
    with pytest.raises(
        ValueError, match=rf"peft\.{option} names '\*\.0\.\*\.linear_fc1'.*linear_fc1_gate, linear_fc1_up"
    ):
        CanonicalLoRA(**{option: ["*.0.*.linear_fc1"]}).check()
