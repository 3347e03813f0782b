# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which modules a target names."""

import pytest

from megatron.bridge.peft.matcher import TARGET_MODULES, ModuleMatcher

QKV = "decoder.layers.1.self_attention.linear_qkv"
LATENT = "decoder.layers.1.self_attention"
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
        (["linear_qkv"], [], f"{LATENT}.linear_q_proj", "linear_qkv"),
        (["*.layers.1.*.linear_qkv"], [], f"{LATENT}.linear_q_up_proj", "*.layers.1.*.linear_qkv"),
        (["*.layers.2.*.linear_qkv"], [], f"{LATENT}.linear_q_up_proj", None),
        (["linear_q", "linear_v"], [], f"{LATENT}.linear_kv_up_proj", "linear_v"),
        (["linear_qkv"], [], f"{LATENT}.linear_kv_down_proj", None),
        (["*.linear_*"], ["linear_qkv"], f"{LATENT}.linear_kv_up_proj", None),
        (TARGET_MODULES, [], "decoder.layers.1.self_attention.in_proj", "linear_qkv"),
        (TARGET_MODULES, [], "decoder.layers.1.self_attention.out_proj", "linear_proj"),
        (["linear_qkv", "linear_proj"], [], "decoder.layers.1.self_attention.in_proj", None),
    ],
)
def test_target_of(targets, excluded, name, target):
    assert ModuleMatcher(target_modules=targets, exclude_modules=excluded).target_of(name) == target
