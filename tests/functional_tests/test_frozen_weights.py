# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Runs with frozen weights: recomputed layers are trained, ranks that train nothing are saved and resumed."""

import pytest

from tests.on_ranks import Recorder, differing
from tests.ranks import RankError, run_on_ranks
from tests.tiny import tiny_config

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
PP2 = {"pipeline_model_parallel_size": 2}


class _Frozen(Recorder):
    def __init__(self):
        super().__init__()
        self.norms = []

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        self.norms.append(context.grad_norm)


def _train(directory, frozen, *, kept=(), wrapped=False, **sections):
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    def freeze(chunks):
        for name, param in (named for chunk in chunks for named in chunk.named_parameters()):
            name = name.removeprefix("module.module.")
            param.requires_grad_(not name.startswith(frozen) or name.startswith(tuple(kept)))

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


@pytest.mark.parametrize("fraction", [None, 0.5], ids=["no offload", "half"])
def test_a_shard_of_padding_resumes(tmp_path, fraction):
    offload = {} if fraction is None else {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    everything = ("embedding", "decoder", "output_layer")
    _check_resume(tmp_path, everything, True, kept=("decoder.final_layernorm",), optimizer=offload)


def test_some_layers_trained_resume(tmp_path):
    _check_resume(tmp_path, ("embedding", "decoder.layers.0"), True)


def _check_resume(directory, frozen, fully, *, model=None, optimizer=None, **options):
    checkpoint = {"save_interval": 1, "dist_ckpt_optim_fully_reshardable": fully}
    options |= {"model": model or {}, "optimizer": optimizer or {}}
    whole = run_on_ranks(_train, 2, directory, frozen, checkpoint=checkpoint, **options)
    resumed = run_on_ranks(_train, 2, directory, frozen, checkpoint={**checkpoint, "ckpt_step": 1}, **options)
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[1:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(RankError, match=r"nothing to train"):
        run_on_ranks(_train, 2, tmp_path, ("embedding", "decoder", "output_layer"))
