# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Non-persistent checkpoints, on two ranks: written in between, newest wins, exact, and never half believed.

A local load hands the optimizer tensors of their own, where other loads fill the optimizer's: it is the case in which
stock Core leaves a precision-aware offloaded optimizer's masters at what they were before.
"""

import shutil

import pytest

from megatron.bridge.checkpoint import iterations
from megatron.bridge.utils.replaced import replaced
from tests.rigs.load import STATE, STILL, parts_equal, refusal
from tests.rigs.non_persistent import (
    ALL,
    FullWitness,
    config_of,
    files_of,
    local_files,
    needs_the_package,
    run_saving,
)
from tests.rigs.on_ranks import differing, make_pretrained, run_finetune
from tests.rigs.ranks import RankError, run_on_ranks

OFF = {"optimizer_cpu_offload": False}
HALF = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
AWARE = {"use_precision_aware_optimizer": True}
CELLS = [
    pytest.param(dict(optimizer=ALL), id="all"),
    pytest.param(dict(optimizer=HALF), id="half"),
    pytest.param(dict(optimizer={**ALL, **AWARE}), id="all, precision-aware"),
    pytest.param(dict(optimizer={**HALF, **AWARE}), id="half, precision-aware"),
    pytest.param(dict(checkpoint={"non_persistent_local_ckpt_algo": "atomic"}), id="all, atomic"),
    pytest.param(dict(model={"pipeline_model_parallel_size": 2}), id="all, pipeline"),
    pytest.param(dict(model={"tensor_model_parallel_size": 2}), id="all, tensor"),
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("non_persistent") / "pretrained"
    run_on_ranks(make_pretrained, 2, path)
    return path


@pytest.fixture
def directory(tmp_path, pretrained):
    (tmp_path / "pretrained").symlink_to(pretrained)
    return tmp_path


def _run_without_exact_resume(directory, **options):
    from megatron.bridge.core_repairs import install

    # The flat step keeps a counter where the load template knows it, and with it its value.
    left = tuple(repair for repair in install.REPAIRS if repair.name not in ("exact resume", "flat step"))
    assert len(left) == len(install.REPAIRS) - 2
    with replaced(install, REPAIRS=left):
        return run_saving(directory, **options)


def _record(directory, **options):
    return run_finetune(config_of(directory, **options))


@needs_the_package
@pytest.mark.parametrize("cell", CELLS)
def test_a_run_that_resumes_from_a_local_checkpoint_equals_the_uninterrupted_one(directory, cell):
    stopped = run_on_ranks(run_saving, 2, directory, train_iters=2, **cell)
    assert local_files(directory) == files_of(2)
    resumed = run_on_ranks(run_saving, 2, directory, **cell)
    assert local_files(directory) == files_of(4), "the newest alone is kept"
    shutil.rmtree(directory / "local")
    whole = run_on_ranks(run_saving, 2, directory, **cell)
    for before, after, uninterrupted in zip(stopped, resumed, whole, strict=True):
        assert parts_equal(before["end"], after["start"]) >= STATE
        assert after["start"]["adam_steps"] == [2.0] and after["start"]["misplaced"] == []
        assert parts_equal(after["end"], uninterrupted["end"]) >= STATE
        assert after["steps"] == [3, 4] and after["losses"] == uninterrupted["losses"][2:]
        assert after["start"]["weights"] != after["end"]["weights"]


@needs_the_package
def test_without_offload_too(directory):
    run_on_ranks(_record, 2, directory, train_iters=2, optimizer=OFF)
    resumed = run_on_ranks(_record, 2, directory, optimizer=OFF)
    shutil.rmtree(directory / "local")
    for after, uninterrupted in zip(resumed, run_on_ranks(_record, 2, directory, optimizer=OFF), strict=True):
        assert after.losses == uninterrupted.losses[2:]
        assert differing(after.weights_after, uninterrupted.weights_after) == {}
        assert after.train_state == uninterrupted.train_state


@needs_the_package
@pytest.mark.parametrize("optimizer", [{**ALL, **AWARE}, {**HALF, **AWARE}], ids=["all", "half"])
def test_a_precision_aware_master_stays_behind_without_the_repair(directory, optimizer):
    """The guard sees it, so the run ends instead of writing the old masters over the loaded weights."""
    run_on_ranks(run_saving, 2, directory, train_iters=2, optimizer=optimizer)
    with pytest.raises(RankError, match="the offloaded optimizer's copy of .* is not the loaded weight"):
        run_on_ranks(_run_without_exact_resume, 2, directory, optimizer=optimizer)


@needs_the_package
def test_adams_step_starts_again_without_the_repair(directory):
    stopped = run_on_ranks(run_saving, 2, directory, train_iters=2)
    for before, after in zip(stopped, run_on_ranks(_run_without_exact_resume, 2, directory), strict=True):
        assert parts_equal(before["end"], after["start"]) >= STATE - {"adam_steps"}
        assert after["start"]["adam_steps"] != before["end"]["adam_steps"]


WITHOUT_OPTIMIZER = {"saved without": {"save_optim": False}, "not asked for": {"load_optim": False}}


@needs_the_package
@pytest.mark.parametrize("optimizer", [ALL, HALF, {**HALF, **AWARE}], ids=["all", "half", "half, precision-aware"])
@pytest.mark.parametrize("case", WITHOUT_OPTIMIZER)
def test_a_local_checkpoint_without_optimizer_rebuilds_the_masters(directory, case, optimizer):
    checkpoint = WITHOUT_OPTIMIZER[case]
    stopped = run_on_ranks(run_saving, 2, directory, train_iters=2, optimizer=optimizer, checkpoint=checkpoint)
    still = {**optimizer, **STILL}
    for before, after in zip(
        stopped,
        run_on_ranks(run_saving, 2, directory, train_iters=3, optimizer=still, checkpoint=checkpoint),
        strict=True,
    ):
        assert after["steps"] == [3]
        assert {"weights", "rng", "step", "consumed"} <= parts_equal(before["end"], after["start"])
        assert set(after["start"]["moments"]) == {"zeros"} and after["start"]["adam_steps"] == [0.0]
        assert after["start"]["copies are the weights"]
        assert after["end"]["weights"] == after["start"]["weights"]


def _run_with_a_full_disk(directory):
    from megatron.bridge.training.run_state.local_files import LocalCheckpointFiles
    from megatron.bridge.utils.distributed import rank

    def no_room(self, state_dict, ckpt_id):
        raise OSError(28, "No space left on device")

    with replaced(LocalCheckpointFiles, **({"_save": no_room} if rank() == 1 else {})):
        return refusal(run_saving, directory, train_iters=3)


@needs_the_package
def test_a_rank_that_cant_write_ends_all(directory):
    for error in run_on_ranks(_run_with_a_full_disk, 2, directory):
        assert "No space left on device" in error


@needs_the_package
def test_what_a_killed_save_and_an_abandoned_course_left_is_in_nobodys_way(directory):
    """Steps 1 to 3, local at 3; back to step 2 and on under another seed: what was at 3 must not come back."""
    (directory / "local" / "0").mkdir(parents=True)
    (directory / "local" / "0" / "iter_0000001_0_local.dirty.pt").write_bytes(b"half")
    checkpoint = {"save": "full", "load": "full", "save_interval": 2, "non_persistent_save_interval": 1}
    run_on_ranks(run_saving, 2, directory, train_iters=3, checkpoint={**checkpoint, "save_interval": 2})
    assert local_files(directory) == [], "the persistent checkpoint of step 3 makes it superfluous"
    later = {**checkpoint, "save_interval": 4}
    run_on_ranks(run_saving, 2, directory, train_iters=5, checkpoint={**later, "save": None})
    assert local_files(directory) == files_of(5)
    back = run_on_ranks(run_saving, 2, directory, train_iters=4, checkpoint={**later, "ckpt_step": 2})
    assert back[0]["steps"] == [3, 4] and local_files(directory) == files_of(3)
    resumed = run_on_ranks(run_saving, 2, directory, train_iters=5, checkpoint=later)
    assert resumed[0]["steps"] == [5]
    assert parts_equal(back[0]["end"], resumed[0]["start"]) >= STATE


@pytest.mark.parametrize("named", [False, True], ids=["in save", "a directory of its own"])
def test_the_newest_of_persistent_and_global_wins(directory, named):
    place = directory / "between" if named else directory / "full" / "non_persistent"
    own = {"non_persistent_global_ckpt_dir": str(place)} if named else {}
    checkpoint = {"save": "full", "load": "full", "save_interval": 3, **own}

    def run(train_iters, **more):
        return run_on_ranks(
            run_saving, 2, directory, kind="global", train_iters=train_iters, checkpoint=checkpoint | more
        )

    whole = run(5)
    assert [step for step, _ in iterations.iterations(directory / "full")] == [3, 5]
    shutil.rmtree(directory / "full")
    shutil.rmtree(place, ignore_errors=True)
    run_on_ranks(_stop_at, 2, directory, 5, train_iters=5, checkpoint=checkpoint)
    assert [step for step, _ in iterations.iterations(directory / "full")] == [3]
    assert [step for step, _ in iterations.iterations(place)] == [4], "the newest alone is kept"
    resumed = run(5)
    for after, uninterrupted in zip(resumed, whole, strict=True):
        assert after["steps"] == [5] and after["losses"] == uninterrupted["losses"][4:]
        assert parts_equal(after["end"], uninterrupted["end"]) >= STATE
    assert run(6, ckpt_step=3)[0]["steps"] == [4, 5, 6]


def _stop_at(directory, step, **options):
    """A run that dies at the start of a step."""

    class Dies(FullWitness):
        def on_train_step_start(self, context):
            if context.state.train_state.step == step - 1:
                raise KeyboardInterrupt

    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    with pytest.raises(KeyboardInterrupt):
        finetune(config_of(directory, kind="global", **options), forward_step, callbacks=[Dies()])
