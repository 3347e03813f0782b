# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's optimizer state in another layout: the same bits, put together over all ranks.

Sizes are odd and buckets small, so that each bucket ends with padding and slices begin in the middle of a row.
"""

import pytest

from tests.on_ranks import Recorder, differing, make_pretrained
from tests.optimizer_state import slices_of, whole_state
from tests.ranks import run_on_ranks
from tests.tiny import VOCAB_SIZE, tiny_config

STEPS, SAVED = 4, 2
SIZES = {
    "num_layers": 2,
    "hidden_size": 36,
    "ffn_hidden_size": 54,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "init_method_std": 0.1,
}
OFF, HALF = {"optimizer_cpu_offload": False}, {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
ALL = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
OFFLOADS = {"off": OFF, "half": HALF, "all": ALL}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
STILL = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
LOSS_TOLERANCE = 1e-2
"""Relative, for sums in another order: weights are bf16."""


class Witness(Recorder):
    """Keeps the optimizer's state too, before the first step and at the step that is saved."""

    def __init__(self):
        super().__init__()
        self.state_before, self.state_saved, self.padding = [], [], 0

    def on_train_start(self, context):
        super().on_train_start(context)
        buffers = [buffer for child in context.optimizer.chained_optimizers for buffer in child.buffers]
        self.padding = sum(
            bucket.grad_data.numel() > bucket.numel_unpadded for buffer in buffers for bucket in buffer.buckets[:-1]
        )
        if context.state.train_state.step > 0:
            self.state_before = slices_of(context.model, context.optimizer)

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        if context.state.train_state.step == SAVED:
            self.state_saved = slices_of(context.model, context.optimizer)


def _config(directory, *, offload=OFF, layout=None, precision="bf16", still=False, **checkpoint):
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    cfg = tiny_config(
        directory,
        train_iters=SAVED + 1 if still else STEPS,
        model={**SIZES, **(layout or {})},
        optimizer={**offload, **(STILL if still else {})},
        scheduler={"lr_decay_iters": 10, "override_opt_param_scheduler": still},
        train={"micro_batch_size": 1, "global_batch_size": 12},
        ddp={"overlap_grad_reduce": True, "bucket_size": 3000},
        checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/pretrained", **checkpoint},
    )
    cfg.mixed_precision = get_mixed_precision_config(f"{precision}_mixed")
    cfg.mixed_precision.initial_loss_scale = 2.0**8
    cfg.mixed_precision.grad_reduce_in_fp32 = True
    return cfg


def _run(cfg):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    witness = Witness()
    finetune(cfg, forward_step, callbacks=[witness])
    return witness


def _save(directory, run, *, fully=True, **options):
    options.update(save=f"{directory}/{run}", save_interval=SAVED, dist_ckpt_optim_fully_reshardable=fully)
    return _run(_config(directory, **options))


def _load(directory, run, **options):
    return _run(_config(directory, load=f"{directory}/{run}", ckpt_step=SAVED, **options))


def _whole(witnesses, which):
    return whole_state([getattr(witness, which) for witness in witnesses], vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("reshard")
    run_on_ranks(make_pretrained, 2, path / "pretrained", model=SIZES)
    return path


@pytest.fixture(scope="module")
def saved(directory):
    """Makes, once, the run that saves under a layout; returns its name and witnesses."""
    runs = {}

    def of(ranks, layout, **options):
        key = f"{ranks}-{layout}-{options}".translate(str.maketrans("", "", " {}':,"))
        if key not in runs:
            runs[key] = run_on_ranks(_save, ranks, directory, key, layout=layout, **options)
        return key, runs[key]

    return of


@pytest.mark.parametrize(
    ("ranks", "offload", "precision"),
    [
        (2, "off", "bf16"),
        (2, "half", "bf16"),
        (2, "all", "bf16"),
        (2, "half", "fp16"),
        (3, "off", "bf16"),
        (3, "all", "bf16"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(directory, saved, ranks, offload, precision):
    options = {"offload": OFFLOADS[offload], "precision": precision}
    run, whole = saved(ranks, {}, **options)
    assert all(witness.padding for witness in whole), "no bucket but the last is padded"
    resumed = run_on_ranks(_load, ranks, directory, run, **options)
    assert differing(_whole(resumed, "state_before"), _whole(whole, "state_saved")) == {}
    for uninterrupted, continued in zip(whole, resumed, strict=True):
        assert continued.losses == uninterrupted.losses[SAVED:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}
        assert continued.train_state == uninterrupted.train_state


RESHARDED = {
    "DP 2 to 1": (2, {}, 1, {}),
    "DP 2 to 3": (2, {}, 3, {}),
    "DP 2 to 4": (2, {}, 4, {}),
    "TP 1 to 2": (2, {}, 2, TP2),
    "TP 2 to 1": (2, TP2, 2, {}),
    "PP 1 to 2": (2, {}, 2, PP2),
    "PP 2 to 1": (2, PP2, 2, {}),
    "TP 2 to PP 2 and DP 2": (2, TP2, 4, PP2),
}


@pytest.mark.parametrize("change", RESHARDED)
def test_another_layout_resumes_the_same_state(directory, saved, change):
    ranks_before, layout_before, ranks, layout = RESHARDED[change]
    run, whole = saved(ranks_before, layout_before)
    resumed = run_on_ranks(_load, ranks, directory, run, layout=layout, offload=HALF)
    assert differing(_whole(resumed, "state_before"), _whole(whole, "state_saved")) == {}
    for uninterrupted, continued in zip(whole[-1:], resumed[-1:], strict=True):
        assert continued.losses == pytest.approx(uninterrupted.losses[SAVED:], rel=LOSS_TOLERANCE)
