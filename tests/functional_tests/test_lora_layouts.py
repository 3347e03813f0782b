# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA, CanonicalLoRA and DoRA compute and train the same at every layout, beside experts of every form too."""

import pytest
import torch

from megatron.bridge.models.layer_specs import has_transformer_engine, transformer_engine_layer_spec
from tests.rigs.grouped_experts import grouped_layer_spec
from tests.rigs.lora import EP2, EXPERTS, PP2, SHARED, SIZES, TP2, make_bases, train
from tests.rigs.on_ranks import differing
from tests.rigs.ranks import run_on_ranks

LAYOUTS = {
    "TP 2": TP2,
    "TP 2, sequence parallel": {**TP2, "sequence_parallel": True},
    "PP 2": PP2,
    "PP 2 x VP 2": {
        **PP2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    },
    "recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
EXPERT_LAYOUTS = {
    "TP 2, experts too": {**EXPERTS, **TP2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    "EP 2, grouped experts": {**EXPERTS, **EP2, "transformer_layer_spec": grouped_layer_spec},
    "TP 2, grouped experts too": {
        **EXPERTS,
        **TP2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 2,
        "transformer_layer_spec": grouped_layer_spec,
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("lora-layouts"))


@pytest.fixture(scope="module")
def trained(directory):
    """A run of three steps that saved its adapters after each."""
    return run_on_ranks(train, 2, directory, save=f"{directory}/adapters", save_interval=1)


@pytest.fixture(scope="module")
def trained_dora(directory):
    """The same with DoRA."""
    return run_on_ranks(train, 2, directory, scheme="dora", save=f"{directory}/dora", save_interval=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_and_trains_the_same(directory, trained, layout):
    _check_layout(directory, trained, layout, run="adapters")


@pytest.mark.parametrize("layout", ["TP 2", "TP 2, sequence parallel"])
def test_every_layout_computes_and_trains_the_same_dora(directory, trained_dora, layout):
    _check_layout(directory, trained_dora, layout, run="dora", scheme="dora")


@pytest.fixture(scope="module")
def trained_canonical(directory):
    """The same with an adapter for each part of fused layers."""
    return run_on_ranks(train, 2, directory, scheme="canonical_lora", save=f"{directory}/parts", save_interval=1)


def test_every_layout_computes_and_trains_the_same_canonical(directory, trained_canonical):
    _check_layout(directory, trained_canonical, "TP 2, sequence parallel", run="parts", scheme="canonical_lora")


_DORA_OF_EXPERTS = {"scheme": "dora", "lora": {"target_modules": ["linear_fc1", "linear_fc2"]}}
"""DoRA has all of LoRA's matrices, and lengths."""


@pytest.fixture(scope="module")
def trained_experts(directory):
    """The same with experts, each a module."""
    run = {"save": f"{directory}/experts-dora", "save_interval": 1}
    return run_on_ranks(train, 2, directory, model=EXPERTS, **run, **_DORA_OF_EXPERTS)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_of_every_form_compute_and_train_the_same(directory, trained_experts, layout):
    _check_layout(directory, trained_experts, layout, run="experts-dora", **_DORA_OF_EXPERTS)


SHARED_LAYOUTS = {
    "EP 2, grouped experts": EXPERT_LAYOUTS["EP 2, grouped experts"],
    "TP 2, EP 2, experts whole": {**EXPERTS, **TP2, **EP2, "sequence_parallel": True},
    "TP 2, experts too": EXPERT_LAYOUTS["TP 2, experts too"],
}


@pytest.fixture(scope="module")
def trained_shared(directory):
    """Adapters that all experts of a layer share."""
    run = {"save": f"{directory}/experts-shared", "save_interval": 1}
    return run_on_ranks(train, 2, directory, model=EXPERTS, **run, **SHARED)


@pytest.mark.parametrize("layout", SHARED_LAYOUTS)
def test_adapters_that_experts_share_compute_and_train_the_same(directory, trained_shared, layout):
    """In the second layout, ranks have other experts and other tokens, and the adapter whole."""
    _check_layout(directory, trained_shared, layout, run="experts-shared", **SHARED)


def test_adapters_that_experts_share_are_stored_once(trained_shared):
    """Two matrices of each layer's experts, with an A and a B each: no axis of experts."""
    names = [name for name in trained_shared[0].weights_after if ".experts." in name and ".adapter." in name]
    assert len(names) == SIZES["num_layers"] * 2 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")
@pytest.mark.parametrize("is_shared", [False, True], ids=["each its own", "shared"])
def test_transformer_engines_grouped_experts_train_as_modules_of_their_own(directory, tmp_path, is_shared):
    """From the same weights, and from the adapters that the grouped form saved after a step."""
    options = {"precision": "bf16_mixed", "lora": {"share_expert_adapters": is_shared}}
    model = {**EXPERTS, "transformer_layer_spec": transformer_engine_layer_spec}
    grouped = {**model, "moe_grouped_gemm": True}
    run = str(tmp_path / "grouped")
    (whole,) = run_on_ranks(train, 1, directory, model=grouped, save=run, save_interval=1, **options)
    (alone,) = run_on_ranks(train, 1, directory, model=model, **options)
    (resumed,) = run_on_ranks(train, 1, directory, model=model, load=run, ckpt_step=1, **options)
    assert alone.losses == pytest.approx(whole.losses, abs=2e-2)
    assert resumed.losses == pytest.approx(whole.losses[1:], abs=2e-2)
    assert differing(whole.weights_before, whole.weights_after) != {}


def _check_layout(directory, trained, layout, *, run, **options):
    """From the adapters of the first step, two more with all state; gradients that some rank lacks would show."""
    options["load"] = f"{directory}/{run}"
    if "experts" in layout:
        options["model"] = EXPERTS
    changed = {
        **options,
        "model": {**LAYOUTS, **EXPERT_LAYOUTS, **SHARED_LAYOUTS}[layout],
        "ckpt_step": 1,
        "save": f"{directory}/new-{run}",
    }
    resumed = run_on_ranks(train, 2, directory, **changed)
    assert resumed[-1].losses == pytest.approx(trained[-1].losses[1:], rel=1e-4)
    base = "experts" if "experts" in layout else "dense"
    assert resumed[0].planned == [base, run]  # the weights underneath and the adapters, each once
    again = run_on_ranks(train, 2, directory, **{**options, "load": changed["save"], "finetune": True})
    for uninterrupted, other in zip(trained, again, strict=True):
        for name, weight in uninterrupted.weights_after.items():
            torch.testing.assert_close(
                other.weights_before[name], weight, rtol=1e-3, atol=2e-4, msg=f"{layout}: {name}"
            )
