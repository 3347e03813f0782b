# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Non-persistent checkpoints, on two ranks: written in between, newest wins, exact, and never half believed.

A local load hands the optimizer tensors of their own, where other loads fill the optimizer's: it is the case in which
stock Core leaves a precision-aware offloaded optimizer's masters at what they were before.
"""

import logging
import shutil
import time

import pytest
import torch
from megatron.core.dist_checkpointing import tensor_aware_state_dict

from megatron.bridge.checkpoint import layout
from tests.functional_tests.test_load_cases import STATE, STILL, Witness, parts_equal
from tests.on_ranks import differing, make_pretrained, run_finetune
from tests.ranks import RankError, run_on_ranks
from tests.tiny import tiny_config

needs_the_package = pytest.mark.skipif(
    not tensor_aware_state_dict.HAVE_NVRX, reason="local checkpoints need nvidia-resiliency-ext, the extra `local`"
)

OFF = {"optimizer_cpu_offload": False}
ALL = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
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


def _config(directory, *, kind="local", train_iters=4, optimizer=ALL, checkpoint=None, model=None, **sections):
    """A run that saves in between, every second step; persistent checkpoints only where a test asks for them."""
    checkpoint = {
        "save": None,
        "pretrained_checkpoint": "pretrained",
        "non_persistent_ckpt_type": kind,
        "non_persistent_save_interval": 2,
        "non_persistent_local_ckpt_dir": "local" if kind == "local" else None,
        **(checkpoint or {}),
    }
    for name in ("save", "load", "pretrained_checkpoint", "non_persistent_local_ckpt_dir"):
        if checkpoint.get(name) is not None:
            checkpoint[name] = f"{directory}/{checkpoint[name]}"
    # Dropout makes the random states matter.
    model = {"hidden_dropout": 0.1, **(model or {})}
    return tiny_config(
        directory, train_iters=train_iters, model=model, optimizer=optimizer, checkpoint=checkpoint, **sections
    )


class _FullWitness(Witness):
    """Keeps also whether every copy equals its weight, and whether state lies where its parameter is."""

    def on_train_start(self, context):
        from megatron.bridge.training.checkpointing import check_hybrid_optimizer_param_copies
        from megatron.bridge.training.cpu_offload.param_copies import find_hybrid_optimizers

        super().on_train_start(context)
        try:
            compared = check_hybrid_optimizer_param_copies(context.optimizer, exact=True, sample_size=10**6)
            self.start["copies are the weights"] = compared > 0
        except RuntimeError:
            self.start["copies are the weights"] = False
        self.start["misplaced"] = [
            key
            for distributed_optimizer in find_hybrid_optimizers(context.optimizer)
            for sub_optimizer in distributed_optimizer.optimizer.sub_optimizers
            for param, state in sub_optimizer.state.items()
            for key, value in state.items()
            if key != "step" and value.is_cuda != param.is_cuda
        ]


def _run(directory, **options):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    witness = _FullWitness()
    finetune(_config(directory, **options), forward_step, callbacks=[witness])
    return {"start": witness.start, "end": witness.end, "losses": witness.losses, "steps": witness.steps}


def _run_without_exact_resume(directory, **options):
    from megatron.bridge.training.cpu_offload import install

    everything = install.REPAIRS
    install.REPAIRS = tuple(repair for repair in everything if repair.name != "exact resume")
    assert len(install.REPAIRS) == len(everything) - 1
    try:
        return _run(directory, **options)
    finally:
        install.REPAIRS = everything


def _record(directory, **options):
    return run_finetune(_config(directory, **options))


def _local_files(directory):
    return sorted(path.relative_to(directory / "local").as_posix() for path in (directory / "local").rglob("*.pt"))


def _files_of(step):
    return [f"{rank}/iter_{step:07d}_{rank}_local.pt" for rank in (0, 1)]


@needs_the_package
@pytest.mark.parametrize("cell", CELLS)
def test_a_run_that_resumes_from_a_local_checkpoint_equals_the_uninterrupted_one(directory, cell):
    stopped = run_on_ranks(_run, 2, directory, train_iters=2, **cell)
    assert _local_files(directory) == _files_of(2)
    resumed = run_on_ranks(_run, 2, directory, **cell)
    assert _local_files(directory) == _files_of(4), "the newest alone is kept"
    shutil.rmtree(directory / "local")
    whole = run_on_ranks(_run, 2, directory, **cell)
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
    run_on_ranks(_run, 2, directory, train_iters=2, optimizer=optimizer)
    with pytest.raises(RankError, match="the offloaded optimizer's copy of .* is not the loaded weight"):
        run_on_ranks(_run_without_exact_resume, 2, directory, optimizer=optimizer)


@needs_the_package
def test_adams_step_starts_again_without_the_repair(directory):
    stopped = run_on_ranks(_run, 2, directory, train_iters=2)
    for before, after in zip(stopped, run_on_ranks(_run_without_exact_resume, 2, directory), strict=True):
        assert parts_equal(before["end"], after["start"]) >= STATE - {"adam_steps"}
        assert after["start"]["adam_steps"] != before["end"]["adam_steps"]


WITHOUT_OPTIMIZER = {"saved without": {"save_optim": False}, "not asked for": {"load_optim": False}}


@needs_the_package
@pytest.mark.parametrize("optimizer", [ALL, HALF, {**HALF, **AWARE}], ids=["all", "half", "half, precision-aware"])
@pytest.mark.parametrize("case", WITHOUT_OPTIMIZER)
def test_a_local_checkpoint_without_optimizer_rebuilds_the_masters(directory, case, optimizer):
    checkpoint = WITHOUT_OPTIMIZER[case]
    stopped = run_on_ranks(_run, 2, directory, train_iters=2, optimizer=optimizer, checkpoint=checkpoint)
    still = {**optimizer, **STILL}
    for before, after in zip(
        stopped, run_on_ranks(_run, 2, directory, train_iters=3, optimizer=still, checkpoint=checkpoint), strict=True
    ):
        assert after["steps"] == [3]
        assert {"weights", "rng", "step", "consumed"} <= parts_equal(before["end"], after["start"])
        assert set(after["start"]["moments"]) == {"zeros"} and after["start"]["adam_steps"] == [0.0]
        assert after["start"]["copies are the weights"]
        assert after["end"]["weights"] == after["start"]["weights"]


def _plans(directory, options_by_name):
    """(where each load would come from, its error, what is said) on this rank."""
    from megatron.bridge.training.checkpointing import init_checkpointing_context, plan_on_all_ranks

    answers = {}
    for name, options in options_by_name.items():
        heard = _Heard()
        logging.getLogger("megatron.bridge").addHandler(heard)
        started = time.monotonic()
        try:
            cfg = _config(directory, **options)
            plan = plan_on_all_ranks(cfg, init_checkpointing_context(cfg))
            answers[name] = str(plan.path.relative_to(directory)), None, heard.messages
        except Exception as error:
            answers[name] = None, f"{type(error).__name__}: {error}", heard.messages
        finally:
            logging.getLogger("megatron.bridge").removeHandler(heard)
        assert time.monotonic() - started < 60
    return answers


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def _plan(directory, **options):
    """Each rank's answer for one load."""
    return [answers["it"] for answers in run_on_ranks(_plans, 2, directory, {"it": options})]


@pytest.fixture(scope="module")
def both(tmp_path_factory, pretrained):
    """Local checkpoints of step 4 (in `local`) and 2 (in `older`), persistent ones of 2 to 4 (in `full`)."""
    directory = tmp_path_factory.mktemp("both")
    (directory / "pretrained").symlink_to(pretrained)
    run_on_ranks(_run, 2, directory, train_iters=2)
    (directory / "local").rename(directory / "older")
    run_on_ranks(_run, 2, directory)
    off = {"non_persistent_save_interval": None, "non_persistent_local_ckpt_dir": None}
    run_on_ranks(_run, 2, directory, kind=None, checkpoint={**off, "save": "full", "save_interval": 1})
    shutil.rmtree(directory / "full" / "iter_0000001")
    return directory


LOCAL = tuple(f"local/{file}" for file in _files_of(4))
OLDER = tuple(f"older/{file}" for file in _files_of(2))
PLANS = {
    "local alone": ({}, LOCAL),
    "newer than the persistent one": ({"load": "two"}, LOCAL),
    "as new as the persistent one": ({"load": "full"}, LOCAL),
    "older than the persistent one": ({"load": "full", "non_persistent_local_ckpt_dir": "older"}, "full/iter_0000004"),
    "a persistent directory that is empty yet": ({"load": "new", "save": "new"}, LOCAL),
    "ckpt_step": ({"load": "full", "ckpt_step": 3}, "full/iter_0000003"),
    "one iteration's directory": ({"load": "full/iter_0000003"}, "full/iter_0000003"),
    "finetune=true": ({"load": "full", "finetune": True}, "full/iter_0000004"),
    "no local one yet": ({"load": "full", "non_persistent_local_ckpt_dir": "nothing"}, "full/iter_0000004"),
    "nothing at all yet": ({"non_persistent_local_ckpt_dir": "nothing"}, "pretrained/iter_0000000"),
}


@needs_the_package
def test_the_newest_of_local_and_persistent_wins(both):
    if not (both / "two").exists():
        shutil.copytree(both / "full", both / "two")
        layout.write_tracker(both / "two", 2)
        for later in (3, 4):
            shutil.rmtree(both / "two" / f"iter_{later:07d}")
    cases = {name: {"checkpoint": checkpoint} for name, (checkpoint, _) in PLANS.items()}
    for rank, answers in enumerate(run_on_ranks(_plans, 2, both, cases)):
        for name, (_, expected) in PLANS.items():
            wanted = expected if isinstance(expected, str) else expected[rank]
            assert answers[name] == (wanted, None, []), name


@needs_the_package
def test_a_file_that_one_rank_lacks_is_passed_over_and_the_log_says_so(both):
    shutil.copytree(both / "local", both / "partial")
    (both / "partial" / _files_of(4)[1]).unlink()
    partial = {"non_persistent_local_ckpt_dir": "partial"}
    for rank, answer in enumerate(_plan(both, checkpoint={**partial, "load": "full"})):
        said = [f"the local checkpoint of step 4 in {both}/partial is passed over: rank(s) 1 have no file of it"]
        assert answer == ("full/iter_0000004", None, said if rank == 0 else [])
    shutil.copytree(both / "older" / "1", both / "partial" / "1", dirs_exist_ok=True)
    shutil.copytree(both / "older" / "0", both / "partial" / "0", dirs_exist_ok=True)
    for rank, answer in enumerate(_plan(both, checkpoint=partial)):
        assert answer[:2] == (f"partial/{_files_of(2)[rank]}", None), "the older one is whole"


@needs_the_package
@pytest.mark.parametrize("damage", ["cut off", "empty", "not ours", "dangerous"])
def test_a_damaged_file_is_named_on_all_ranks(both, damage):
    place = both / damage.replace(" ", "_")
    shutil.copytree(both / "local", place)
    path = place / _files_of(4)[1]
    if damage == "dangerous":
        torch.save({"a": _Dangerous()}, path)
    elif damage == "not ours":
        torch.save({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -100])
    for rank, (_, error, _) in enumerate(_plan(both, checkpoint={"non_persistent_local_ckpt_dir": place.name})):
        assert error.startswith("ValueError: " if rank == 1 else "RuntimeError: ")
        assert f"{path} can't be read as a local checkpoint: " in error and "; remove it, and the run goes on" in error
        assert "\n" not in error


class _Dangerous:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def _refusal(directory, **options):
    started = time.monotonic()
    try:
        _run(directory, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "no error", time.monotonic() - started


@needs_the_package
def test_a_changed_byte_in_a_tensor_is_an_error_that_names_the_file(both):
    shutil.copytree(both / "local", both / "flipped")
    path = both / "flipped" / _files_of(4)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    checkpoint = {"non_persistent_local_ckpt_dir": "flipped"}
    for error, seconds in run_on_ranks(_refusal, 2, both, train_iters=5, checkpoint=checkpoint):
        assert f"{path} can't be read as a local checkpoint: " in error and "\n" not in error
        assert seconds < 60


@needs_the_package
def test_another_layout_is_refused(both):
    for rank, (_, error, _) in enumerate(_plan(both, model={"tensor_model_parallel_size": 2})):
        assert (
            f"{both}/{LOCAL[rank]}" in error and "was saved under model.tensor_model_parallel_size 1 -> 2, and" in error
        )
        assert "remove the directory's files to go on from the newest persistent checkpoint" in error


@needs_the_package
def test_another_model_is_refused_before_anything_is_exchanged(both):
    for error, seconds in run_on_ranks(_refusal, 2, both, train_iters=5, model={"ffn_hidden_size": 64}):
        assert "linear_fc1.weight as this run's rank " in error and "\n" not in error
        assert seconds < 60


def _run_with_a_full_disk(directory):
    from megatron.bridge.training.local_checkpoint_files import LocalCheckpointFiles
    from megatron.bridge.utils.distributed import rank

    def no_room(self, state_dict, ckpt_id):
        raise OSError(28, "No space left on device")

    stock = LocalCheckpointFiles._save
    if rank() == 1:
        LocalCheckpointFiles._save = no_room
    try:
        return _refusal(directory, train_iters=3)
    finally:
        LocalCheckpointFiles._save = stock


@needs_the_package
def test_a_rank_that_cant_write_ends_all(directory):
    for error, seconds in run_on_ranks(_run_with_a_full_disk, 2, directory):
        assert "No space left on device" in error
        assert seconds < 60


@needs_the_package
def test_what_a_killed_save_and_an_abandoned_course_left_is_in_nobodys_way(directory):
    """Steps 1 to 3, local at 3; back to step 2 and on under another seed: what was at 3 must not come back."""
    (directory / "local" / "0").mkdir(parents=True)
    (directory / "local" / "0" / "iter_0000001_0_local.dirty.pt").write_bytes(b"half")
    checkpoint = {"save": "full", "load": "full", "save_interval": 2, "non_persistent_save_interval": 1}
    run_on_ranks(_run, 2, directory, train_iters=3, checkpoint={**checkpoint, "save_interval": 2})
    assert _local_files(directory) == [], "the persistent checkpoint of step 3 makes it superfluous"
    later = {**checkpoint, "save_interval": 4}
    run_on_ranks(_run, 2, directory, train_iters=5, checkpoint={**later, "save": None})
    assert _local_files(directory) == _files_of(5)
    back = run_on_ranks(_run, 2, directory, train_iters=4, checkpoint={**later, "ckpt_step": 2})
    assert back[0]["steps"] == [3, 4] and _local_files(directory) == _files_of(3)
    resumed = run_on_ranks(_run, 2, directory, train_iters=5, checkpoint=later)
    assert resumed[0]["steps"] == [5]
    assert parts_equal(back[0]["end"], resumed[0]["start"]) >= STATE


@pytest.mark.parametrize("named", [False, True], ids=["in save", "a directory of its own"])
def test_the_newest_of_persistent_and_global_wins(directory, named):
    place = directory / "between" if named else directory / "full" / "non_persistent"
    own = {"non_persistent_global_ckpt_dir": str(place)} if named else {}
    checkpoint = {"save": "full", "load": "full", "save_interval": 3, **own}

    def run(train_iters, **more):
        return run_on_ranks(_run, 2, directory, kind="global", train_iters=train_iters, checkpoint=checkpoint | more)

    whole = run(5)
    assert [step for step, _ in layout.iterations(directory / "full")] == [3, 5]
    shutil.rmtree(directory / "full")
    shutil.rmtree(place, ignore_errors=True)
    run_on_ranks(_stop_at, 2, directory, 5, train_iters=5, checkpoint=checkpoint)
    assert [step for step, _ in layout.iterations(directory / "full")] == [3]
    assert [step for step, _ in layout.iterations(place)] == [4], "the newest alone is kept"
    resumed = run(5)
    for after, uninterrupted in zip(resumed, whole, strict=True):
        assert after["steps"] == [5] and after["losses"] == uninterrupted["losses"][4:]
        assert parts_equal(after["end"], uninterrupted["end"]) >= STATE
    assert run(6, ckpt_step=3)[0]["steps"] == [4, 5, 6]


def _stop_at(directory, step, **options):
    """A run that dies at the start of a step."""

    class Dies(_FullWitness):
        def on_train_step_start(self, context):
            if context.state.train_state.step == step - 1:
                raise KeyboardInterrupt

    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    with pytest.raises(KeyboardInterrupt):
        finetune(_config(directory, kind="global", **options), forward_step, callbacks=[Dies()])
