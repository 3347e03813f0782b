# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Options whose effect isn't in a figure: when garbage is collected, and how a checkpoint is read."""

import gc
import sys

import pytest

from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config


def _collections(directory, manual_gc_eval):
    """Generation of each collection that the loop asked for, and whether Python collected by itself in evaluations."""
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    found, collects_by_itself, collect = [], [], gc.collect

    def recording(generation=2):
        if sys._getframe(1).f_globals["__name__"] == "megatron.bridge.training.train":
            found.append(generation)
        return collect(generation)

    class Watch(Callback):
        def on_eval_start(self, context):
            collects_by_itself.append(gc.isenabled())

    cfg = tiny_config(
        directory,
        train_iters=3,
        train={"manual_gc": True, "manual_gc_interval": 3, "manual_gc_eval": manual_gc_eval},
        validation={"eval_interval": 2, "eval_iters": 1},
        checkpoint={"save": None},
    )
    gc.collect = recording
    try:
        pretrain(cfg, forward_step, [Watch()])
    finally:
        gc.collect = collect
    return found, collects_by_itself[0]


@pytest.mark.parametrize(("manual_gc_eval", "around"), [(True, [2, 0]), (False, [])])
def test_garbage_is_collected_around_an_evaluation_unless_told_otherwise(tmp_path, manual_gc_eval, around):
    [(found, by_itself)] = run_on_ranks(_collections, 1, tmp_path, manual_gc_eval)
    assert found == [2, *around, 2] and not by_itself  # at the start, around the evaluation, after step 3


def _read_with(directory, options):
    """What Core was told of each load, and the losses after it."""
    from megatron.bridge.checkpoint import sharded_state
    from tests.rigs.on_ranks import make_pretrained, run_finetune

    make_pretrained(f"{directory}/pretrained")
    told, wrapper, load = [], sharded_state.FullyParallelLoadStrategyWrapper, sharded_state.dist_checkpointing.load

    def wrapping(*args, **kwargs):
        told.append(kwargs["exchange_algo"])
        return wrapper(*args, **kwargs)

    def loading(*args, **kwargs):
        told.append(kwargs["validate_access_integrity"])
        return load(*args, **kwargs)

    losses = []
    for index, checkpoint in enumerate(options):
        cfg = tiny_config(
            f"{directory}/{index}",
            train_iters=1,
            checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/pretrained", **checkpoint},
        )
        sharded_state.FullyParallelLoadStrategyWrapper, sharded_state.dist_checkpointing.load = wrapping, loading
        try:
            losses.append(run_finetune(cfg).losses)
        finally:
            sharded_state.FullyParallelLoadStrategyWrapper = wrapper
            sharded_state.dist_checkpointing.load = load
    return told, losses


def test_a_checkpoint_is_read_as_asked(tmp_path):
    ways = ["broadcast", "gather_object"]  # gather_rounds needs NCCL
    options = [{}, {"ckpt_load_validate_sharding_integrity": False}]
    options += [{"fully_parallel_load": True, "ckpt_fully_parallel_load_exchange_algo": way} for way in ways]
    for told, losses in run_on_ranks(_read_with, 2, tmp_path, options):
        assert told == [True, False, "broadcast", True, "gather_object", True]
        assert all(same == losses[0] for same in losses)


def _train_nothing(directory):
    from tests.rigs.on_ranks import make_pretrained, run_finetune

    make_pretrained(f"{directory}/pretrained")
    cfg = tiny_config(directory, checkpoint={"save": None, "pretrained_checkpoint": f"{directory}/pretrained"})
    cfg.model.register_pre_wrap_hook(lambda chunks: [chunk.requires_grad_(False) for chunk in chunks])
    with pytest.raises(ValueError, match="there is nothing to train"):
        run_finetune(cfg)


def test_a_run_with_nothing_to_train_is_refused_on_all_ranks(tmp_path):
    run_on_ranks(_train_nothing, 2, tmp_path)


def _threads_of_steps(directory, num_threads):
    """The process's threads in each offloaded step, and after the run."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from megatron.bridge.offload_engine.adam import FlatAdam
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    seen = set()

    def count(optimizer, *_):
        if isinstance(optimizer, FlatAdam):
            seen.add(torch.get_num_threads())

    cfg = tiny_config(directory, train_iters=2, checkpoint={"save": None})
    cfg.optimizer.optimizer_cpu_offload, cfg.optimizer.optimizer_offload_fraction = True, 1.0
    cfg.optimizer.optimizer_cpu_num_threads = num_threads
    hook = register_optimizer_step_pre_hook(count)
    try:
        pretrain(cfg, forward_step)
    finally:
        hook.remove()
    return seen, torch.get_num_threads()


def test_an_offloaded_step_runs_with_the_threads_asked_for(tmp_path):
    [(in_steps, after)] = run_on_ranks(_threads_of_steps, 1, tmp_path, 3)
    assert in_steps == {3} and after == 1
