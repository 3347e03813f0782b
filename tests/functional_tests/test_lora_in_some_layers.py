# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adapters in some layers, or beside some experts: saved, resumed bit-exact and read at other layouts, as all are."""

import pytest

from tests.rigs.lora import AWARE, EP2, EXPERTS, HALF, PP2, TP2, make_bases, train
from tests.rigs.on_ranks import differing
from tests.rigs.ranks import run_on_ranks

FULLY, BY_BUCKET = {}, {"dist_ckpt_optim_fully_reshardable": False}
LAST_LAYER = {"lora": {"target_modules": ["*.layers.3.*.linear_qkv"]}, "model": PP2}
CELLS = {
    "PP 2, nothing in the first stage": {**LAST_LAYER, **FULLY},
    "PP 2, nothing in the first stage, by bucket, offload": {**LAST_LAYER, **BY_BUCKET, "optimizer": AWARE},
    "DoRA, a pattern beside a name, half": {
        "lora": {"target_modules": ["linear_proj", "*.layers.1.*.linear_fc1"]},
        "scheme": "dora",
        "optimizer": HALF,
        **FULLY,
    },
    "EP 2, an expert of one rank in three layers, by bucket": {
        "lora": {"target_modules": ["*.local_experts.3.linear_fc1"], "exclude_modules": ["*.layers.1.*"]},
        "model": {**EXPERTS, **EP2},
        **BY_BUCKET,
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("some-layers"))


@pytest.mark.parametrize("cell", CELLS)
def test_a_resumed_run_equals_the_uninterrupted_one(directory, cell):
    options, run = {"precision": "bf16_mixed", **CELLS[cell]}, f"{directory}/{cell}"
    whole = run_on_ranks(train, 2, directory, save=run, save_interval=1, **options)
    resumed = run_on_ranks(train, 2, directory, load=run, ckpt_step=1, **options)
    assert any(differing(one.weights_before, one.weights_after) for one in whole)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[1:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}


def test_they_are_read_at_other_layouts(directory):
    from megatron.bridge.checkpoint.sharded_state import stored_shapes

    options, run = {"lora": {"target_modules": ["linear_proj", "*.layers.[12].*.linear_fc1"]}}, f"{directory}/reshard"
    whole = run_on_ranks(train, 2, directory, save=run, save_interval=1, **options)
    shapes = stored_shapes(f"{run}/iter_0000001")
    assert shapes["decoder.layers.self_attention.linear_proj.adapter.linear_in.weight"] == (4, 4, 64)
    assert shapes["decoder.layers.mlp.linear_fc1.adapter.linear_out.weight[2]"] == (256, 4)
    assert shapes["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.adapter.linear_out.weight[2]"] == (256, 4)
    for layout in (TP2, PP2):
        resumed = run_on_ranks(train, 2, directory, load=run, ckpt_step=1, model=layout, **options)
        assert resumed[-1].losses == pytest.approx(whole[-1].losses[1:], rel=1e-4)


def test_an_expert_has_one_number_and_one_adapter_at_every_layout(directory):
    targets = {"target_modules": ["*.local_experts.3.linear_fc1", "*.layers.2.*.linear_qkv"]}
    options, run = {"lora": targets, "timeout_seconds": 60}, f"{directory}/experts-together"
    whole = run_on_ranks(train, 2, directory, model=EXPERTS, save=run, save_interval=1, **options)
    spread = run_on_ranks(train, 2, directory, model={**EXPERTS, **EP2}, **options)
    resumed = run_on_ranks(train, 2, directory, model={**EXPERTS, **EP2}, load=run, ckpt_step=1, **options)
    assert [len(differing(one.weights_before, one.weights_after)) for one in spread] == [2, 10]  # 4 layers and one
    for together, apart, later in zip(whole, spread, resumed, strict=True):
        assert apart.losses == pytest.approx(together.losses, rel=1e-6)
        assert later.losses == pytest.approx(together.losses[1:], rel=1e-6)
