# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA in a run: only adapters train; they are all that is saved, resume exactly, and can be left out and merged."""

import dataclasses

import pytest
import torch

from tests.rigs.lora import AWARE, EP2, EXPERTS, HALF, PP2, SHARED, TP2, lora_config, make_bases, train
from tests.rigs.on_ranks import Recorder, differing
from tests.rigs.ranks import RankError, run_on_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def trained(directory):
    """A run of three steps that saved its adapters after each."""
    return run_on_ranks(train, 2, directory, save=f"{directory}/adapters", save_interval=1)


def test_only_adapters_are_trained_and_have_optimizer_state(trained):
    for run in trained:
        moved = differing(run.weights_before, run.weights_after)
        assert moved and all(".adapter." in name for name in moved)
        assert len(moved) == 4 * 4 * 2  # layers, linear layers, A and B
        assert run.owned <= run.trained < run.all / 5


def test_a_checkpoint_holds_only_adapters(directory, trained):
    from megatron.bridge.checkpoint.sharded_state import stored_shapes

    shapes = stored_shapes(directory / "adapters" / "iter_0000003")
    assert all(".adapter." in key for key in shapes if key.startswith(("decoder.", "embedding.", "optimizer.")))
    assert shapes["decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"] == (4, 4, 64)
    assert shapes["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.adapter.linear_out.weight"] == (4, 256, 4)


EXACT = {
    "no offload": {"precision": "bf16_mixed"},
    "half, LoRA+": {"precision": "bf16_mixed", "optimizer": HALF, "ratio": 4.0},
    "all, precision-aware": {"precision": "bf16_mixed", "optimizer": AWARE},
    "half, TP 2, dropout, parts of fused layers": {
        "precision": "bf16_mixed",
        "optimizer": HALF,
        "model": TP2,
        "scheme": "canonical_lora",
        "lora": {
            "dropout": 0.1,
            "target_modules": ["linear_q", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc2"],
        },
    },
    "half, DoRA": {"precision": "bf16_mixed", "optimizer": HALF, "scheme": "dora"},
    "half, experts": {"precision": "bf16_mixed", "optimizer": HALF, "model": {**EXPERTS, **EP2}},
    "half, shared by experts": {"precision": "bf16_mixed", "optimizer": HALF, "model": {**EXPERTS, **EP2}, **SHARED},
}


@pytest.mark.parametrize("cell", EXACT)
def test_a_resumed_run_equals_the_uninterrupted_one(directory, cell):
    options, run = EXACT[cell], f"{directory}/{cell}"
    whole = run_on_ranks(train, 2, directory, save=run, save_interval=1, **options)
    resumed = run_on_ranks(train, 2, directory, load=run, ckpt_step=1, **options)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[1:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}
        assert differing(continued.weights_before, continued.weights_after) != {}
        assert continued.rates == uninterrupted.rates and len(continued.rates) == (2 if "ratio" in options else 1)
    weights_only = run_on_ranks(train, 2, directory, load=run, load_optim=False, **options)
    for uninterrupted, continued in zip(whole, weights_only, strict=True):
        assert differing(continued.weights_before, uninterrupted.weights_after) == {}


class Disabled(Recorder):
    """The loss of one batch with adapters, without them, and with adapters merged into the weights."""

    def on_train_start(self, context):
        from megatron.bridge.peft import LoRAMerge

        peft = context.state.cfg.peft
        self.adapted = _logits(context)
        with peft.disable_adapter(context.model):
            self.disabled = _logits(context)
        assert torch.equal(self.adapted, _logits(context))
        merge = LoRAMerge()
        assert merge(context.model) is context.model and not merge.params_to_save
        self.merged = _logits(context)
        assert all(".adapter." not in name for chunk in context.model for name, _ in chunk.named_parameters())
        context.state.train_state.do_train = False


@torch.no_grad()
def _logits(context):
    tokens = torch.arange(16).repeat(2, 1)
    model = context.model[0].eval()
    logits = model(tokens, torch.arange(16).repeat(2, 1), None)
    model.train()
    return logits.clone()


@pytest.mark.parametrize(
    ("scheme", "layout"), [("lora", {}), ("lora", TP2), ("dora", {}), ("dora", TP2), ("canonical_lora", TP2)]
)
def test_adapters_can_be_left_out_and_merged(directory, layout, scheme):
    for run in run_on_ranks(train, 2, directory, callback=Disabled, model=layout, scheme=scheme):
        assert (run.adapted - run.disabled).abs().max() > 1e-3
        torch.testing.assert_close(run.merged, run.adapted, rtol=1e-4, atol=1e-5)


REFUSED = {
    "a whole model to resume": ({"load": "{directory}/dense"}, r"holds a whole model, and peft is set"),
    "adapters as weights": (
        {"pretrained_checkpoint": "{directory}/adapters"},
        r"holds adapters only: expected the weights",
    ),
    "another rank": ({"load": "{directory}/adapters", "lora": {"dim": 8}}, r"holds adapters of peft.dim=4, not 8"),
    "LoRA+ where there was none": (
        {"load": "{directory}/adapters", "ratio": 16.0},
        r"has other learning rates of single parameters .*: \(highest, lowest\) none -> \[\(0.16, 0.0016\)\]",
    ),
    "another scale": ({"load": "{directory}/adapters", "lora": {"alpha": 4}}, r"of peft.alpha=8, not 4: set it to 8"),
    "other layers": (
        {"load": "{directory}/adapters", "lora": {"target_modules": ["linear_qkv"]}},
        r"peft.target_modules=.*, not \['linear_qkv'\] .*has one there and not here",
    ),
    "other layers, weights alone": (
        {"load": "{directory}/adapters", "lora": {"target_modules": ["linear_qkv"]}, "load_optim": False},
        r"peft.target_modules=.*, not \['linear_qkv'\] .*has one there and not here",
    ),
    "other layers, from step 0": (
        {"load": "{directory}/adapters", "lora": {"target_modules": ["linear_qkv"]}, "finetune": True},
        r"peft.target_modules=.*, not \['linear_qkv'\] .*has one there and not here",
    ),
    "layers left out": (
        {"load": "{directory}/adapters", "lora": {"exclude_modules": ["*.layers.1.*"]}},
        r"peft.exclude_modules=\[\], not \['\*.layers.1.\*'\] .*has one there and not here",
    ),
    "no such module": (
        {"lora": {"target_modules": ["q_proj"]}},
        r"names 'q_proj', which matches no module .*; this model has linear_fc1, linear_fc2, linear_proj, linear_qkv",
    ),
    "no such module, of the parts of fused layers": (
        {"scheme": "canonical_lora", "lora": {"target_modules": ["q_proj"]}},
        r"names 'q_proj', which matches no module .*; this model has linear_fc1_gate, .*, linear_proj, linear_q, ",
    ),
    "no linear layer": (
        {"lora": {"target_modules": ["*.pre_mlp_layernorm"]}},
        r"which is a RMSNorm: expected one of",
    ),
    "a fused layer by its parts": (
        {"scheme": "canonical_lora", "lora": {"target_modules": ["linear_qkv"]}},
        r"names 'linear_qkv', a fused layer that CanonicalLoRA adapts in parts: expected linear_q, linear_k, linear_v",
    ),
    "dropout of 1": ({"lora": {"dropout": 1.0}}, r"peft.dropout=1.0: expected 0 or more, below 1"),
    "FP32 masters of frozen weights": (
        {"load_main_params_from_ckpt": True, "load_optim": False},
        r"frozen weights have no FP32 masters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(directory, trained, case):
    options, message = REFUSED[case]
    options = {k: v.format(directory=directory) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(RankError, match=message):
        run_on_ranks(train, 2, directory, **options)


def test_a_run_without_peft_refuses_adapters(directory, trained):
    with pytest.raises(RankError, match=r"holds adapters only, and peft is not set"):
        run_on_ranks(_train_whole, 2, directory)


def _train_whole(directory):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    cfg = lora_config(directory, load=f"{directory}/adapters")
    cfg.peft = None
    finetune(cfg, forward_step)


TARGETS = {
    "one layer, over all stages": (["*.layers.3.*.linear_qkv"], [], {"decoder.layers.1.self_attention.linear_qkv"}),
    "all but one kind": (
        ["linear_proj", "linear_fc2"],
        ["*.layers.1.mlp.*"],
        {"decoder.layers.0.self_attention.linear_proj"},
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_names_or_patterns(directory, case):
    targets, excluded, expected = TARGETS[case]
    lora = {"target_modules": targets, "exclude_modules": excluded}
    for rank, adapted in enumerate(run_on_ranks(_adapted_names, 2, directory, lora)):
        if len(targets) == 1:
            assert adapted == (expected if rank == 1 else set())
        else:
            assert expected < adapted and (rank == 1) == ("decoder.layers.1.mlp.linear_fc2" in adapted)


def _adapted_names(directory, lora):
    from megatron.bridge.training.config import runtime_config_update
    from megatron.bridge.utils.distributed import model_parallel_groups

    cfg = lora_config(directory, lora=lora, model=PP2)
    runtime_config_update(cfg)
    with model_parallel_groups(1, 2):
        (chunk,) = cfg.model.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=cfg.peft)
    names = {name.split(".adapter.")[0] for name, _ in chunk.named_parameters() if ".adapter." in name}
    return {name.removeprefix("module.") for name in names}


def test_options_can_be_overridden_and_written(directory):
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.utils.overrides import apply_overrides
    from megatron.bridge.utils.yaml_io import from_yaml_dict, to_yaml_dict

    cfg = lora_config(directory)
    apply_overrides(cfg, ["peft.dim=16", "peft.target_modules=[linear_qkv]"])
    assert (cfg.peft.dim, cfg.peft.target_modules) == (16, ["linear_qkv"])
    read = from_yaml_dict(to_yaml_dict(cfg.peft))
    assert isinstance(read, LoRA) and dataclasses.asdict(read) == dataclasses.asdict(cfg.peft)
