# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs with frozen weights: recomputed layers are trained, ranks that train nothing are saved and resumed."""

import pytest
import torch
import torch.distributed as dist

from tests.rigs.non_persistent import needs_the_package
from tests.rigs.on_ranks import Recorder, differing
from tests.rigs.ranks import RankError, run_on_ranks
from tests.rigs.tiny import tiny_config

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
PP2, TP2 = {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}
EP2 = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2,
}
EVERYTHING = ("embedding", "decoder", "output_layer")
LAST_EXPERT = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1"
PLAIN = {"use_distributed_optimizer": False}


class _Frozen(Recorder):
    def __init__(self):
        super().__init__()
        self.norms, self.gradient = [], None

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        self.norms.append(context.grad_norm)
        for name, param in context.model[0].named_parameters():
            if LAST_EXPERT in name and param.requires_grad and self.gradient is None:
                self.gradient = param.main_grad.clone()


def _train(directory, frozen, *, kept=(), rank=None, wrapped=False, **sections):
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    def freeze(chunks):
        for name, param in (named for chunk in chunks for named in chunk.named_parameters()):
            name = name.removeprefix("module.module.")
            is_kept = name.startswith(tuple(kept)) and rank in (None, dist.get_rank())
            param.requires_grad_(not name.startswith(frozen) or is_kept)

    cfg = tiny_config(directory, **sections)
    cfg.checkpoint.load = cfg.checkpoint.save
    (cfg.model.register_post_wrap_hook if wrapped else cfg.model.register_pre_wrap_hook)(freeze)
    recorder = _Frozen()
    pretrain(cfg, forward_step, callbacks=[recorder])
    return recorder


@pytest.mark.parametrize("method", ["uniform", "block"])
def test_recomputed_layers_above_a_frozen_embedding_are_trained(tmp_path, method):
    frozen = ("embedding", "decoder.layers.0.mlp")
    plain = run_on_ranks(_train, 2, tmp_path / "plain", frozen, model=PP2)
    full = run_on_ranks(_train, 2, tmp_path / "full", frozen, model={**PP2, **FULL, "recompute_method": method})
    for without, recomputed in zip(plain, full, strict=True):
        assert recomputed.norms == pytest.approx(without.norms, rel=1e-3)
        moved = differing(without.weights_before, without.weights_after).keys()
        assert moved and differing(recomputed.weights_before, recomputed.weights_after).keys() == moved


@pytest.mark.parametrize("fully", [False, True], ids=["by bucket", "fully reshardable"])
def test_a_frozen_stage_resumes(tmp_path, fully):
    _check_resume(tmp_path, ("embedding", "decoder"), fully, model=PP2)


@pytest.mark.parametrize(
    ("fraction", "fully"),
    [(0.0, False), (0.5, False), (0.5, True)],
    ids=["by bucket", "by bucket, half offloaded", "fully reshardable, half offloaded"],
)
def test_a_shard_of_padding_resumes(tmp_path, fraction, fully):
    optimizer = {"optimizer_cpu_offload": fraction > 0, "optimizer_offload_fraction": fraction}
    _check_resume(tmp_path, EVERYTHING, fully, kept=("decoder.final_layernorm",), optimizer=optimizer)


def test_a_shard_of_padding_between_two_parameters_resumes_by_bucket(tmp_path):
    """Of 4 shards of 32 elements, the second holds none of two parameters of 32, nor does the last."""
    options = {"kept": ("decoder.final_layernorm", "decoder.layers.1.input_layernorm"), "model": {"hidden_size": 32}}
    options |= {"train": {"micro_batch_size": 1}, "timeout_seconds": 60}
    whole = _check_resume(tmp_path, EVERYTHING, False, ranks=4, **options)
    on_two = run_on_ranks(_train, 2, tmp_path, EVERYTHING, checkpoint={"ckpt_step": 1}, **options)
    assert on_two[0].losses == pytest.approx(whole[0].losses[1:], rel=1e-5)


def test_some_layers_trained_resume(tmp_path):
    _check_resume(tmp_path, ("embedding", "decoder.layers.0"), True)


@pytest.mark.parametrize("frozen", [EVERYTHING, ("embedding", "decoder.layers.0.self_attention")], ids=["all", "some"])
def test_a_frozen_stage_resumes_without_the_distributed_optimizer(tmp_path, frozen):
    kept = ("decoder.layers.0.input_layernorm", "decoder.final_layernorm")
    _check_resume(tmp_path, frozen, True, kept=kept, rank=1, model=PP2, optimizer=PLAIN, ddp=PLAIN)


@needs_the_package
def test_a_local_checkpoint_of_a_frozen_stage_resumes(tmp_path):
    """Each rank reads its own file, and that of the frozen stage holds nothing of the optimizer."""
    local = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": f"{tmp_path}/local"}
    checkpoint = {"save": None, **local, "non_persistent_save_interval": 2}
    options = {"kept": ("decoder.final_layernorm",), "model": PP2, "optimizer": PLAIN, "ddp": PLAIN}
    options |= {"checkpoint": checkpoint, "timeout_seconds": 60}
    whole = run_on_ranks(_train, 2, tmp_path, EVERYTHING, **options)
    resumed = run_on_ranks(_train, 2, tmp_path, EVERYTHING, **options)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[2:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}


@pytest.mark.parametrize("plain", [False, True], ids=["distributed", "plain"])
def test_an_expert_of_one_rank_gets_the_gradient_that_it_gets_among_trained_ones(tmp_path, plain):
    options = {"kept": (LAST_EXPERT,), "rank": 1, "model": EP2, "optimizer": {"clip_grad": 0.0}, "ddp": {}}
    if plain:
        options["optimizer"] |= PLAIN
        options |= {"ddp": PLAIN, "model": {**EP2, **FULL, "recompute_method": "uniform"}}
    _, trained = _check_resume(tmp_path / "frozen", EVERYTHING, False, **options)
    (tmp_path / "whole").mkdir()
    _, whole = run_on_ranks(_train, 2, tmp_path / "whole", (), **options)
    assert trained.gradient.any() and torch.allclose(trained.gradient, whole.gradient, rtol=1e-2, atol=1e-5)


def _check_resume(directory, frozen, fully, *, ranks=2, model=None, optimizer=None, **options):
    checkpoint = {"save_interval": 1, "dist_ckpt_optim_fully_reshardable": fully}
    options |= {"model": model or {}, "optimizer": optimizer or {}, "timeout_seconds": 60}
    whole = run_on_ranks(_train, ranks, directory, frozen, checkpoint=checkpoint, **options)
    resumed = run_on_ranks(_train, ranks, directory, frozen, checkpoint={**checkpoint, "ckpt_step": 1}, **options)
    assert any(differing(one.weights_before, one.weights_after) for one in whole)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[1:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}
    return whole


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (TP2, "decoder.layers.1.self_attention.linear_qkv.weight"),
        ({}, "decoder.final_layernorm.weight"),
        ({**PP2, "share_embeddings_and_output_weights": True}, "output_layer.weight"),
    ],
    ids=["TP 2", "DP 2", "PP 2, tied"],
)
def test_a_weight_frozen_on_a_part_of_its_ranks_is_refused(tmp_path, model, kept):
    name = "the tied embedding" if "share_embeddings_and_output_weights" in model else kept
    with pytest.raises(RankError, match=rf"ValueError: {name} is trained on rank 1 and frozen on rank 0, which hold"):
        run_on_ranks(_train, 2, tmp_path, EVERYTHING, kept=(kept,), rank=1, model=model, timeout_seconds=60)


def test_weights_frozen_after_they_were_wrapped_are_refused(tmp_path):
    with pytest.raises(
        RankError, match=r"embedding.word_embeddings.weight has requires_grad=False, and was trained when"
    ):
        run_on_ranks(_train, 2, tmp_path, ("embedding",), wrapped=True)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(RankError, match=r"nothing to train"):
        run_on_ranks(_train, 2, tmp_path, EVERYTHING)
