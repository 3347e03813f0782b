# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's optimizer state in another layout: the same bits, put together over all ranks.

Sizes are odd and buckets small, so that buckets end with padding and slices begin in the middle of a row.
"""

import contextlib

import pytest
import torch.distributed as dist

from tests.on_ranks import Recorder, differing, make_pretrained
from tests.optimizer_state import slices_of, whole_state
from tests.ranks import run_on_ranks
from tests.tiny import VOCAB_SIZE, fp32_norm_layer_spec, tiny_config

STEPS, SAVED = 4, 2
SIZES = {
    "num_layers": 2,
    "hidden_size": 36,
    "ffn_hidden_size": 54,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "init_method_std": 0.1,
}
MODELS = {
    "dense": SIZES,
    "tied": {**SIZES, "share_embeddings_and_output_weights": True},
    "FP32 norms": {**SIZES, "transformer_layer_spec": fp32_norm_layer_spec},
    "experts": {
        **SIZES,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 27,
        "moe_token_dispatcher_type": "alltoall",
        "expert_tensor_parallel_size": 1,
    },
}
OFF, HALF = {"optimizer_cpu_offload": False}, {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
ALL = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
AWARE = {"use_precision_aware_optimizer": True}
TP2, PP2, EP2 = ({f"{axis}_parallel_size": 2} for axis in ("tensor_model", "pipeline_model", "expert_model"))
BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 3000}
STILL = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
LOSS_TOLERANCE = 1e-2
"""Relative, for sums in another order: weights are bf16."""


class Witness(Recorder):
    """Keeps the optimizer's state too, before the first step and at the step that is saved."""

    def __init__(self):
        super().__init__()
        self.loaded, self.saved, self.padded_buckets = [], [], 0

    def on_train_start(self, context):
        super().on_train_start(context)
        buffers = [buffer for child in context.optimizer.chained_optimizers for buffer in child.buffers]
        self.padded_buckets = sum(
            bucket.grad_data.numel() > bucket.numel_unpadded for buffer in buffers for bucket in buffer.buckets[:-1]
        )
        if context.state.train_state.step == SAVED:
            self.loaded = slices_of(context.model, context.optimizer)

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        if context.state.train_state.step == SAVED:
            self.saved = slices_of(context.model, context.optimizer)


def _config(
    directory, *, model="dense", layout=None, offload=OFF, precision="bf16", still=False, ddp=BUCKETS, **checkpoint
):
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    sizes = {**MODELS[model], **(layout or {})}
    across = sizes.get("tensor_model_parallel_size", 1) * sizes.get("pipeline_model_parallel_size", 1)
    cfg = tiny_config(
        directory,
        train_iters=SAVED + 1 if still else STEPS,
        model=sizes,
        optimizer={**offload, **(STILL if still else {})},
        scheduler={"lr_decay_iters": 10, "override_opt_param_scheduler": still},
        train={"micro_batch_size": 12 // (dist.get_world_size() // across), "global_batch_size": 12},
        ddp=ddp,
        checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/{model}", **checkpoint},
    )
    cfg.mixed_precision = get_mixed_precision_config(f"{precision}_mixed")
    cfg.mixed_precision.initial_loss_scale = 2.0**8  # no step overflows
    cfg.mixed_precision.grad_reduce_in_fp32 = True  # precision-aware mode wants it for FP16
    return cfg


def _run(cfg):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    witness = Witness()
    finetune(cfg, forward_step, callbacks=[witness])
    return witness


def _save(directory, run, *, fully=True, by_core=False, **options):
    options.update(save=f"{directory}/{run}", save_interval=SAVED, dist_ckpt_optim_fully_reshardable=fully)
    with _cores_own_format() if by_core else contextlib.nullcontext():
        return _run(_config(directory, **options))


@contextlib.contextmanager
def _cores_own_format():
    from megatron.bridge.training.cpu_offload import install

    ours = install.REPAIRS
    install.REPAIRS = tuple(repair for repair in ours if repair.name != "reshardable state")
    try:
        yield
    finally:
        install.REPAIRS = ours


def _load(directory, run, **options):
    return _run(_config(directory, load=f"{directory}/{run}", ckpt_step=SAVED, **options))


def _whole(witnesses, which):
    return whole_state([getattr(witness, which) for witness in witnesses], vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def saved(directory):
    """Makes, once, the run that saves on so many ranks with these options; returns its name and its witnesses."""
    runs = {}

    def of(ranks, model="dense", **options):
        if not (directory / model).exists():
            run_on_ranks(make_pretrained, 2, directory / model, model=MODELS[model])
        key = repr((ranks, model, sorted(options.items())))
        if key not in runs:
            name = f"run{len(runs)}"
            runs[key] = name, run_on_ranks(_save, ranks, directory, name, model=model, **options)
        return runs[key]

    return of


EXACT = {
    "no offload": (2, {}),
    "half": (2, {"offload": HALF}),
    "all": (2, {"offload": ALL}),
    "all, fp16": (2, {"offload": ALL, "precision": "fp16"}),
    "half, precision-aware": (2, {"offload": {**HALF, **AWARE}}),
    "all, precision-aware, fp16": (2, {"offload": {**ALL, **AWARE}, "precision": "fp16"}),
    "3 ranks": (3, {}),
    "3 ranks, half": (3, {"offload": HALF}),
    "FP32 norms": (2, {"model": "FP32 norms", "offload": HALF}),
    "FP32 norms, dp_reshardable": (2, {"model": "FP32 norms", "offload": HALF, "fully": False}),
    "experts": (2, {"model": "experts", "layout": EP2, "offload": HALF}),
    "experts, dp_reshardable": (2, {"model": "experts", "layout": EP2, "offload": HALF, "fully": False}),
}


@pytest.mark.parametrize("cell", EXACT)
def test_resumed_run_equals_the_uninterrupted_one(directory, saved, cell):
    ranks, options = EXACT[cell]
    run, whole = saved(ranks, **options)
    assert all(witness.padded_buckets for witness in whole), "no bucket but the last is padded"
    resumed = run_on_ranks(_load, ranks, directory, run, **{k: v for k, v in options.items() if k != "fully"})
    assert differing(_whole(resumed, "loaded"), _whole(whole, "saved")) == {}
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[SAVED:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}
        assert continued.train_state == uninterrupted.train_state


TO_ONE_BUCKET = {"ddp": {"overlap_grad_reduce": False, "bucket_size": None}}
RESHARDED = {
    "DP 2 to 1": (2, {}, 1, TO_ONE_BUCKET),
    "DP 2 to 3": (2, {}, 3, {}),
    "DP 2 to 4": (2, {}, 4, {}),
    "dp_reshardable, DP 2 to 1": (2, {"fully": False}, 1, {}),
    "dp_reshardable, DP 2 to 4": (2, {"fully": False}, 4, {}),
    "TP 1 to 2": (2, {}, 2, {"layout": TP2}),
    "TP 2 to 1": (2, {"layout": TP2}, 2, {}),
    "PP 1 to 2": (2, {}, 2, {"layout": PP2}),
    "PP 2 to 1": (2, {"layout": PP2}, 2, {}),
    "TP 2 to PP 2 and DP 2": (2, {"layout": TP2}, 4, {"layout": PP2}),
    "tied, PP 1 to 2": (2, {"model": "tied"}, 2, {"layout": PP2}),
    "tied, PP 2 to 1": (2, {"model": "tied", "layout": PP2}, 2, {}),
    "FP32 norms, TP 2 to 1": (2, {"model": "FP32 norms", "layout": TP2}, 2, {}),
    "experts, PP 2 to 1": (2, {"model": "experts", "layout": PP2}, 2, {}),
    "written by Core, DP 2 to 1": (2, {"by_core": True, **TO_ONE_BUCKET}, 1, {}),
}


@pytest.mark.parametrize("change", RESHARDED)
def test_another_layout_resumes_the_same_state(directory, saved, change):
    ranks_before, before, ranks, after = RESHARDED[change]
    run, whole = saved(ranks_before, **before)
    after = {"model": before.get("model", "dense"), "offload": HALF, **after}
    resumed = run_on_ranks(_load, ranks, directory, run, **after)
    assert differing(_whole(resumed, "loaded"), _whole(whole, "saved")) == {}
    assert resumed[-1].losses == pytest.approx(whole[-1].losses[SAVED:], rel=LOSS_TOLERANCE)
    if "model" in before:
        return  # one model is enough for what follows
    still = run_on_ranks(_load, ranks, directory, run, still=True, **after)
    for witness in still:
        assert differing(witness.weights_before, witness.weights_after) == {}


def test_a_resume_keeps_no_more_memory_than_the_run_did(directory, saved):
    options = EXACT["half, precision-aware"][1]
    run, whole = saved(2, **options)
    for uninterrupted, continued in zip(whole, run_on_ranks(_load, 2, directory, run, **options), strict=True):
        held = [sum(one.held_bytes for one in slices) for slices in (uninterrupted.saved, continued.loaded)]
        assert held[0] == held[1] == sum(8 * one.tensors["exp_avg"].numel() for one in continued.loaded)


def test_cores_own_routine_saves_wrong_state_where_buckets_are_padded(directory, saved):
    run, whole = saved(2, by_core=True)
    loaded = run_on_ranks(_load, 2, directory, run)
    assert differing(_whole(loaded, "loaded"), _whole(whole, "saved")) != {}
