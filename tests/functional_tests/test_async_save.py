# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Saves that are written while training continues, on two ranks: what is saved is the state at the save.

An offloaded optimizer's masters and moments lie on the host, where the next step changes them; here the writer is held
back until three more steps are taken, so that whatever isn't copied at the save is seen to have moved.
"""

import os
import threading
import time

import pytest

from megatron.bridge.checkpoint import iterations
from megatron.bridge.utils.replaced import replaced
from tests.rigs.on_ranks import Recorder, differing, make_pretrained
from tests.rigs.ranks import run_on_ranks
from tests.rigs.stored import stored_content, unequal
from tests.rigs.tiny import tiny_config

OFFLOAD = {
    "off": {},
    "all": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0},
    "half": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
}
SAVED, HELD_BACK_UNTIL, STEPS = 3, 6, 7


def _config(directory, *, save, offload="all", train_iters=STEPS, **checkpoint):
    return tiny_config(
        directory,
        train_iters=train_iters,
        model={"hidden_dropout": 0.1},  # makes the random states matter
        optimizer=OFFLOAD[offload],
        checkpoint={
            "pretrained_checkpoint": f"{directory}/pretrained",
            "save": f"{directory}/{save}",
            "load": f"{directory}/{save}",
            "save_interval": SAVED,
            **checkpoint,
        },
    )


class _Watcher(Recorder):
    """Lets the writer begin when `HELD_BACK_UNTIL` steps are taken; notes what counts on disk after each step."""

    def __init__(self, root):
        super().__init__()
        self.root, self.go, self.trackers, self.told = root, threading.Event(), {}, []

    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        step = context.state.train_state.step
        self.trackers[step] = _tracked(self.root)
        if step == HELD_BACK_UNTIL:
            self.go.set()
            context.state.background_save._thread.join(60)

    def on_checkpoint_save(self, context):
        self.told.append((_tracked(self.root), context.state.train_state.step))


def _tracked(root):
    tracker = iterations.read_tracker(root)
    return None if tracker is None else tracker.iteration


def _finetune(cfg, recorder):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    finetune(cfg, forward_step, callbacks=[recorder])
    return recorder


def _run(directory, **options):
    return _finetune(_config(directory, **options), Recorder())


def _run_held_back(directory, *, copies=True, **options):
    """A run whose first save is written late; without `copies` of what lies in the optimizer by then."""
    from megatron.bridge.checkpoint.sharded_save import ShardedSave

    cfg = _config(directory, async_save=True, **options)
    watcher = _Watcher(cfg.checkpoint.save)
    write = ShardedSave.write
    without_copies = {} if copies else {"copy_tensors": lambda self: None}
    with replaced(ShardedSave, write=lambda self: watcher.go.wait(60) and write(self), **without_copies):
        _finetune(cfg, watcher)
    return {"losses": watcher.losses, "trackers": watcher.trackers, "told": watcher.told}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("async_save") / "pretrained"
    run_on_ranks(make_pretrained, 2, path)
    return path


@pytest.fixture
def directory(tmp_path, pretrained):
    (tmp_path / "pretrained").symlink_to(pretrained)
    return tmp_path


@pytest.mark.parametrize("offload", OFFLOAD)
def test_the_state_saved_is_the_state_at_the_save(directory, offload):
    whole = run_on_ranks(_run, 2, directory, save="sync", offload=offload)
    for run, uninterrupted in zip(
        run_on_ranks(_run_held_back, 2, directory, save="async", offload=offload), whole, strict=True
    ):
        assert run["losses"] == uninterrupted.losses
        assert run["trackers"] == dict.fromkeys(range(1, HELD_BACK_UNTIL + 1)) | {STEPS: 3}, "moved when complete"
        assert run["told"] == [(3, 6), (6, 7), (7, 7)], "each when it is complete, with the step taken by then"
    for iteration in (3, 6, 7):
        assert (
            unequal(stored_content(directory / "sync", iteration), stored_content(directory / "async", iteration))
            == set()
        )
    _resume_equals(directory, whole, offload)


def _resume_equals(directory, whole, offload):
    """From the held-back save on, a resumed run equals the uninterrupted one, bit-exact."""
    checkpoint = dict(save="async", offload=offload, ckpt_step=SAVED)
    for resumed, uninterrupted in zip(run_on_ranks(_run, 2, directory, **checkpoint), whole, strict=True):
        assert resumed.losses == uninterrupted.losses[SAVED:]
        assert differing(resumed.weights_after, uninterrupted.weights_after) == {}
        assert resumed.train_state == uninterrupted.train_state


@pytest.mark.parametrize("offload", ["all", "half"])
def test_without_the_copy_later_steps_are_in_it(directory, offload):
    run_on_ranks(_run, 2, directory, save="sync", offload=offload)
    run_on_ranks(_run_held_back, 2, directory, save="async", offload=offload, copies=False)
    moved = unequal(stored_content(directory / "sync", SAVED), stored_content(directory / "async", SAVED))
    assert any(key.startswith("optimizer.") for key in moved), moved


def test_pruning_waits_for_the_new_one(directory):
    run_on_ranks(_run, 2, directory, save="kept", async_save=True, most_recent_k=1)
    assert [iteration for iteration, _ in iterations.iterations(directory / "kept")] == [7]
    assert _tracked(directory / "kept") == 7 and iterations.leftovers(directory / "kept") == []


def _run_that_cannot_write(directory, *, rank):
    """(error, steps taken) of a run on which one rank's disk is full."""
    import torch.distributed as dist

    from megatron.bridge.checkpoint.sharded_save import ShardedSave

    cfg = _config(directory, save="full", async_save=True, save_interval=2)
    recorder, copy = Recorder(), ShardedSave.copy_tensors

    def on_a_full_disk(self):
        copy(self)
        if dist.get_rank() == rank:
            for path, _, _ in self._writer.write_buckets:
                os.symlink("/dev/full", path)

    try:
        with replaced(ShardedSave, copy_tensors=on_a_full_disk):
            _finetune(cfg, recorder)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", len(recorder.losses)
    return "no error", len(recorder.losses)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_writer_ends_all_ranks_at_a_following_step(directory, rank):
    answers = run_on_ranks(_run_that_cannot_write, 2, directory, rank=rank)
    for own_rank, (error, steps) in enumerate(answers):
        assert f".iter_0000002.saving can't be written on rank {rank} (No space left on device)" in error, error
        assert error.startswith("OSError" if own_rank == rank else "RuntimeError: writing") and "\n" not in error
        assert steps == answers[0][1] < STEPS
    assert _tracked(directory / "full") is None
    assert [path.name for path in iterations.leftovers(directory / "full")] == [".iter_0000002.saving"]


class _Failing(Recorder):
    def on_train_step_end(self, context):
        super().on_train_step_end(context)
        if context.state.train_state.step == SAVED + 1:
            raise KeyError("a callback's own error")


def _run_that_fails_while_it_writes(directory):
    """(error, threads that still write) of a run with a slow disk."""
    from megatron.bridge.checkpoint.sharded_save import ShardedSave

    recorder, write_item = _Failing(), ShardedSave._write_item

    def slowly(save, *arguments):
        time.sleep(0.3)
        write_item(save, *arguments)

    try:
        with replaced(ShardedSave, _write_item=slowly):
            _finetune(_config(directory, save="given_up", async_save=True), recorder)
    except KeyError as error:
        writing = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint writer"]
        return str(error), writing


def test_a_run_that_fails_gives_up_what_it_writes(directory):
    for error, writing in run_on_ranks(_run_that_fails_while_it_writes, 2, directory):
        assert "a callback's own error" in error and writing == []
    assert _tracked(directory / "given_up") is None
    assert [path.name for path in iterations.leftovers(directory / "given_up")] == [".iter_0000003.saving"]
