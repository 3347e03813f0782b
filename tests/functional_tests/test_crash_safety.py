# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Saves that go wrong: a full disk, a killed process. The last complete checkpoint stays, no rank waits for ever."""

import json
import logging
import os
import signal
import sys
import threading
import time

import psutil
import pytest
import torch
from megatron.core import __version__ as core_version

from megatron.bridge.checkpoint import iterations
from megatron.bridge.checkpoint.model_checkpoint import commit_checkpoint, prepare_save
from tests.rigs.on_ranks import Recorder, differing, make_pretrained
from tests.rigs.ranks import RankError, run_on_ranks
from tests.rigs.tiny import tiny_config
from tests.soak.__main__ import soak, write
from tests.soak.faults import FAULTS

STEPS = 4
SEED = 6
CORE_FORKS_WRITERS = core_version.startswith("0.16.")


def _config(directory, **checkpoint):
    return tiny_config(
        directory,
        train_iters=STEPS,
        optimizer={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0},
        checkpoint={
            "pretrained_checkpoint": f"{directory}/pretrained",
            "load": f"{directory}/checkpoints",
            "save_interval": 2,
            "most_recent_k": 1,
            **checkpoint,
        },
    )


def _run(directory, **checkpoint):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    recorder = Recorder()
    finetune(_config(directory, **checkpoint), forward_step, callbacks=[recorder])
    return recorder


def _run_on_a_full_disk(directory, name):
    """The error of a run whose second save finds no space for the file `name`."""
    from megatron.bridge.training.run_state import iteration_save
    from megatron.bridge.utils.distributed import is_rank_0
    from megatron.bridge.utils.replaced import replaced

    prepare = iteration_save.prepare_save

    def prepare_on_a_full_disk(root, iteration, **options):
        unfinished = prepare(root, iteration, **options)
        if iteration == STEPS and is_rank_0():
            (unfinished / name).symlink_to("/dev/full")
        return unfinished

    try:
        with replaced(iteration_save, prepare_save=prepare_on_a_full_disk):
            _run(directory)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("crash_safety") / "pretrained"
    run_on_ranks(make_pretrained, 2, path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pretrained):
    """The uninterrupted run, on each rank."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "pretrained").symlink_to(pretrained)
    return run_on_ranks(_run, 2, directory)


@pytest.fixture
def directory(tmp_path, pretrained):
    (tmp_path / "pretrained").symlink_to(pretrained)
    return tmp_path


@pytest.mark.parametrize(("name", "failing_rank"), [("__0_0.distcp", 0), ("__1_0.distcp", 1), (".metadata.tmp", 0)])
def test_a_full_disk_ends_all_ranks_and_the_run_goes_on_from_the_save_before(directory, whole, name, failing_rank):
    answers = run_on_ranks(_run_on_a_full_disk, 2, directory, name)
    for rank, error in enumerate(answers):
        assert f".iter_0000004.saving can't be written on rank {failing_rank} (No space left on device)" in error
        assert error.startswith("OSError" if rank == failing_rank else "RuntimeError") and "\n" not in error
    root = directory / "checkpoints"
    assert iterations.resolve_checkpoint(root).name == "iter_0000002"
    assert [path.name for path in iterations.leftovers(root)] == [".iter_0000004.saving"]
    resumed = run_on_ranks(_run, 2, directory)
    _ends_as(resumed, whole, losses_from=2)
    assert iterations.leftovers(root) == [] and iterations.resolve_checkpoint(root).name == "iter_0000004"


def _ends_as(resumed, whole, *, losses_from):
    for after, uninterrupted in zip(resumed, whole, strict=True):
        assert after.losses == uninterrupted.losses[losses_from:]
        assert differing(after.weights_after, uninterrupted.weights_after) == {}
        assert after.train_state == uninterrupted.train_state


def _children_while_saving(directory):
    """The processes that this rank started and that live while it writes, beyond those from before."""
    from megatron.bridge.checkpoint.sharded_save import ShardedSave

    before, seen, write = set(psutil.Process().children(recursive=True)), set(), ShardedSave._write_item

    def look_and_write(self, *arguments):
        seen.update(psutil.Process().children(recursive=True))
        return write(self, *arguments)

    ShardedSave._write_item = look_and_write
    try:
        _run(directory)
    finally:
        ShardedSave._write_item = write
    return [" ".join(process.cmdline()) for process in seen - before if process.is_running()], threading.active_count()


def test_a_save_starts_no_process_that_could_die_under_it(directory):
    for processes, _ in run_on_ranks(_children_while_saving, 2, directory):
        assert processes == []


def _fill(directory, mark):
    """What a save writes before its closing steps, in small."""
    for name in ("__0_0.distcp", iterations.DCP_METADATA_FILE):
        (directory / name).write_text(mark)
    (directory / iterations.METADATA_FILE).write_text(json.dumps({"sharded_backend": "torch_dist"}))


def _save(root, iteration, mark, *, keep=0):
    unfinished = prepare_save(root, iteration, option="root")
    _fill(unfinished, mark)
    _close(unfinished, iteration, mark, keep=keep)


def _close(unfinished, iteration, mark, *, keep):
    commit_checkpoint(unfinished, iteration, run_config={"mark": mark}, train_state={"step": torch.tensor(iteration)})
    iterations.prune(unfinished.parent, keep)


EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
"""Python's names of what touches the disk; a process is killed just before one of them takes place."""


def _close_until_event(number, unfinished, iteration, mark, *, keep):
    """Whether a child process took all closing steps before it came to its `number`th event and was killed there."""
    child = os.fork()
    if child == 0:
        count = 0

        def kill_at(event, _):
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(kill_at)
            _close(unfinished, iteration, mark, keep=keep)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("iteration", [3, 2], ids=["a new iteration", "one that is there"])
def test_killed_between_any_two_closing_steps_a_complete_checkpoint_is_found(tmp_path, iteration):
    found, number, is_done = [], 0, False
    while not is_done:
        number += 1
        root = tmp_path / str(number)
        for step in (1, 2):
            _save(root, step, "old")
        unfinished = prepare_save(root, iteration, option="root")
        _fill(unfinished, "new")
        is_done = _close_until_event(number, unfinished, iteration, "new", keep=1)
        directory = iterations.resolve_checkpoint(root)
        mark = (directory / "__0_0.distcp").read_text()
        assert (directory / iterations.CONFIG_FILE).read_text() == f"mark: {mark}\n", number
        step = int(torch.load(directory / iterations.TRAIN_STATE_FILE)["step"])
        assert step == (iteration if mark == "new" else 2), number
        found.append(mark if directory.name.startswith("iter_") else "taken aside")
        _save(root, iteration, "next", keep=1)
        assert iterations.leftovers(root) == [] and [left for left, _ in iterations.iterations(root)] == [iteration]
        assert (iterations.resolve_checkpoint(root) / "__0_0.distcp").read_text() == "next"
    assert number > 15 and found[0] == "old" and found[-1] == "new"
    assert ("taken aside" in found) == (iteration == 2)


def test_what_killed_processes_left_is_named_on_a_load(directory, caplog):
    from megatron.bridge.training.checkpointing import plan_on_all_ranks

    root = directory / "checkpoints"
    run_on_ranks(_run, 2, directory, save_optim=False)
    os.replace(root / "iter_0000004", root / ".iter_0000004.old")
    (root / ".iter_0000006.saving").mkdir()
    with caplog.at_level(logging.WARNING):
        plan = plan_on_all_ranks(_config(directory), {})
    assert plan.path == root / ".iter_0000004.old"
    assert ".iter_0000006.saving is passed over: the process that wrote or removed it was killed" in caplog.text


@pytest.mark.timeout(1800)
def test_a_run_struck_by_faults_ends_as_the_uninterrupted_one():
    """One of each sort; `make soak` has 200 of all kinds."""
    sorts = ("one rank, in a save", "all ranks, in a load", "no space within", "read-only", "torn file")
    kinds = [kind for kind in FAULTS if any(sort in kind.name for sort in sorts)]
    soaked = soak(len(kinds), seed=SEED, kinds=kinds)
    assert soaked.struck == {kind.name: 1 for kind in kinds} and len(kinds) == len(sorts)
    assert any(step > 0 for step in soaked.resumed_at), "no start found a checkpoint: nothing was resumed"


def test_the_table_goes_between_its_marks(tmp_path):
    document = tmp_path / "reliability.md"
    marks = [f"<!-- {word} of make soak, megatron-core {core_version} -->" for word in ("begin", "end")]
    document.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    write("new", document)
    assert document.read_text() == f"before\n{marks[0]}\n\nnew\n\n{marks[1]}\nafter\n"
    document.write_text("before")
    with pytest.raises(ValueError, match="has no '<!-- begin of make soak, megatron-core"):
        write("new", document)


def _save_with_stock_core(directory, *, trouble):
    """Core's own save of one tensor on each rank, in trouble on one of them."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rank = dist.get_rank()
    directory.mkdir(exist_ok=True)
    dist.barrier()
    if rank == 0 and trouble == "full disk":
        (directory / ".metadata.tmp").symlink_to("/dev/full")
    if rank == 1 and trouble == "killed writer":
        threading.Thread(target=_kill_writers, daemon=True).start()
    # Pickling this takes a while, which is when the writer is killed.
    tensor = ShardedTensor.from_rank_offsets("tensor", torch.ones(1, 1 << 24), (0, rank, 2))
    try:
        dist_checkpointing.save({"tensor": tensor}, str(directory))
    except OSError:
        return "this rank knows, and no one else"


def _kill_writers():
    """Kill what this process forks (writers), not what it spawns (Core's holder of a queue)."""
    own, seen = psutil.Process().cmdline(), set()
    while True:
        copies = {child for child in psutil.Process().children() if _command_of(child) == own}
        for child in copies & seen:  # at its first sight it may be one that is about to become another program
            child.kill()
        seen = copies
        time.sleep(0.01)


def _command_of(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # or it is dead, and not yet waited for
        return None


def test_stock_core_waits_for_ever(tmp_path):
    trouble = "killed writer" if CORE_FORKS_WRITERS else "full disk"
    with pytest.raises(RankError, match="did not finish within 10 seconds"):
        run_on_ranks(_save_with_stock_core, 2, tmp_path / "stock", trouble=trouble, timeout_seconds=10)
