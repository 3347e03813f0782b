# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Non-persistent checkpoints, on two ranks: written in between, newest wins, exact, and never half believed.

A local load hands the optimizer tensors of their own, where other loads fill the optimizer's: it is the case in which
stock Core leaves an offloaded optimizer's masters at what they were before.
"""

import shutil

import pytest

from tests.functional_tests.test_load_cases import STATE, Witness, parts_equal
from tests.on_ranks import make_pretrained, precision_aware_needs_transformer_engine
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

needs_the_package = pytest.mark.skipif(
    not tensor_aware_state_dict.HAVE_NVRX, reason="local checkpoints need nvidia-resiliency-ext, the extra `local`"
)

ALL = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
HALF = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
AWARE = {"use_precision_aware_optimizer": True}
CELLS = [
    pytest.param(ALL, id="all"),
    pytest.param(HALF, id="half"),
    pytest.param({**HALF, "overlap_cpu_optimizer_d2h_h2d": True}, id="half, overlap"),
    pytest.param({**ALL, **AWARE}, id="all, precision-aware"),
    pytest.param({**HALF, **AWARE}, id="half, precision-aware"),
]
ANOTHER_SCHEDULE = {"override_opt_param_scheduler": True}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("non_persistent") / "pretrained"
    run_on_ranks(make_pretrained, 2, path)
    return path


@pytest.fixture
def directory(tmp_path, pretrained):
    (tmp_path / "pretrained").symlink_to(pretrained)
    return tmp_path


def _config(directory, *, kind="local", train_iters=4, optimizer=ALL, checkpoint=None, **sections):
    """A run that saves in between, every second step; persistent checkpoints only where a test asks for them."""
    fields = {
        "save": None,
        "pretrained_checkpoint": f"{directory}/pretrained",
        "non_persistent_ckpt_type": kind,
        "non_persistent_save_interval": 2,
        **({"non_persistent_local_ckpt_dir": f"{directory}/local"} if kind == "local" else {}),
        **(checkpoint or {}),
    }
    return tiny_config(
        directory,
        train_iters=train_iters,
        model={"hidden_dropout": 0.1, **sections.pop("model", {})},
        optimizer=optimizer,
        checkpoint=fields,
        **sections,
    )


def _run(directory, **options):
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    witness = Witness()
    finetune(_config(directory, **options), forward_step, callbacks=[witness])
    return {"start": witness.start, "end": witness.end, "losses": witness.losses, "steps": witness.steps}


def _run_without(directory, *, left_out, **options):
    """A run in which repairs of the optimizer are not installed; None: in which all are, but masters aren't pushed."""
    from megatron.bridge.training.cpu_offload import install

    everything = install.REPAIRS
    install.REPAIRS = tuple(repair for repair in everything if repair.name != left_out)
    assert len(install.REPAIRS) == len(everything) - 1
    try:
        return _run(directory, **options)
    finally:
        install.REPAIRS = everything


def _local_files(directory):
    return sorted(path.relative_to(directory / "local").as_posix() for path in (directory / "local").rglob("*.pt"))


@needs_the_package
@pytest.mark.parametrize("optimizer", CELLS)
def test_a_run_that_resumes_from_a_local_checkpoint_equals_the_uninterrupted_one(directory, optimizer):
    if "use_precision_aware_optimizer" in optimizer and run_on_ranks(precision_aware_needs_transformer_engine, 2)[0]:
        pytest.skip("this Core builds a precision-aware optimizer only with Transformer Engine")
    stopped = run_on_ranks(_run, 2, directory, train_iters=2, optimizer=optimizer)
    assert _local_files(directory) == [f"{rank}/iter_0000002_{rank}_local.pt" for rank in (0, 1)]
    resumed = run_on_ranks(_run, 2, directory, optimizer=optimizer)
    assert _local_files(directory) == [f"{rank}/iter_0000004_{rank}_local.pt" for rank in (0, 1)], "only the newest"
    shutil.rmtree(directory / "local")
    whole = run_on_ranks(_run, 2, directory, optimizer=optimizer)
    for before, after, uninterrupted in zip(stopped, resumed, whole, strict=True):
        assert parts_equal(after["start"], before["end"]) == STATE
        assert parts_equal(after["end"], uninterrupted["end"]) == STATE
        assert after["steps"] == [3, 4] and after["losses"] == uninterrupted["losses"][2:]
        assert after["start"]["adam_steps"] == [2.0] and after["start"]["weights"] != after["end"]["weights"]
