# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's adapters beside this run's: what is the same, and what is refused or warned of."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.run_state.adapters import check_adapted_layers, check_adapters
from megatron.bridge.utils.yaml_io import to_yaml_dict

NAMES = frozenset(
    f"decoder.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1")
)


def _check(saved, now, base="base"):
    now.module_names = NAMES
    cfg = SimpleNamespace(peft=now, checkpoint=SimpleNamespace(pretrained_checkpoint=base))
    run_config = {"peft": to_yaml_dict(saved), "checkpoint": {"pretrained_checkpoint": "base"}}
    check_adapters(cfg, run_config, Path("iter_0000002"))
    check_adapted_layers(cfg, run_config, Path("iter_0000002"))


@pytest.mark.parametrize(
    "now",
    [
        LoRA(target_modules=["linear_proj", "linear_qkv"]),
        LoRA(target_modules=["*.self_attention.linear_*"]),
        LoRA(target_modules=["linear_qkv", "linear_proj", "linear_fc1"], exclude_modules=["*.mlp.*"], dropout=0.5),
    ],
)
def test_the_same_layers_are_no_difference(now):
    _check(LoRA(target_modules=["linear_qkv", "linear_proj"]), now)


@pytest.mark.parametrize(
    "saved, now, message",
    [
        (LoRA(), LoRA(target_modules=["linear_qkv"]), r"peft\.target_modules=\['linear_qkv', .* has one there and not"),
        (LoRA(target_modules=["linear_qkv"]), LoRA(), r"peft\.target_modules=\['linear_qkv'\], not .* here and not"),
        (LoRA(), LoRA(exclude_modules=["*.layers.1.*"]), r"of peft\.exclude_modules=\[\], not \['\*\.layers\.1"),
        (DoRA(), LoRA(alpha=64), r"of the kind megatron.bridge.peft.dora.DoRA, and peft is a LoRA"),
        (LoRA(alpha=64), DoRA(), r"of the kind megatron.bridge.peft.lora.LoRA, and peft is a DoRA"),
        (LoRA(dim=8), LoRA(dim=4), r"peft\.dim=8, not 4"),
        (LoRA(), LoRA(normalize_moe_lora=True), r"peft\.normalize_moe_lora=False, not True"),
    ],
)
def test_others_are_refused_in_one_line(saved, now, message):
    with pytest.raises(ValueError, match=message):
        _check(saved, now)


def test_another_base_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        _check(LoRA(), LoRA())
        assert not caplog.records
        _check(LoRA(), LoRA(), base="other")
    assert "checkpoint.pretrained_checkpoint=other" in caplog.text
