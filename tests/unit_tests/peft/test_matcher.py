# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which modules a target names."""

import pytest

from megatron.bridge.peft.matcher import ModuleMatcher

QKV = "decoder.layers.1.self_attention.linear_qkv"
FC1 = "decoder.layers.12.mlp.linear_fc1"


@pytest.mark.parametrize(
    ("targets", "excluded", "name", "target"),
    [
        (["linear_qkv"], [], QKV, "linear_qkv"),
        (["linear_qkv"], [], FC1, None),
        (["qkv"], [], QKV, None),  # a last name is the whole last name
        (["*.layers.1.*.linear_qkv"], [], QKV, "*.layers.1.*.linear_qkv"),
        (["*.layers.1.*"], [], FC1, None),  # 1 is not 12
        (["*.mlp.*", "linear_fc1"], [], FC1, "*.mlp.*"),
        (["linear_qkv"], ["*.layers.1.*"], QKV, None),
        (["linear_fc1"], ["linear_fc1"], FC1, None),
        ([QKV], [], QKV, QKV),
    ],
)
def test_target_of(targets, excluded, name, target):
    assert ModuleMatcher(target_modules=targets, exclude_modules=excluded).target_of(name) == target
