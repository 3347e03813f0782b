# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Stop and resume: a run that was interrupted ends with the bits of the run that was not.

Stock Core can't do this for any offloaded optimizer (the repairs in training/cpu_offload say why); without Transformer
Engine or Apex it can't for a plain one either. One test shows that the repairs are what makes it work.
"""

import pytest

from tests.on_ranks import differing, make_pretrained, run_finetune
from tests.ranks import RankError, run_on_ranks
from tests.tiny import tiny_config

STEPS = 5
CELLS = [
    pytest.param({"optimizer_cpu_offload": False}, id="no offload"),
    pytest.param({"optimizer_offload_fraction": 0.5}, id="half"),
    pytest.param({"optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True}, id="half, overlap"),
    pytest.param({"optimizer_offload_fraction": 1.0}, id="all"),
    pytest.param({"optimizer_offload_fraction": 1.0, "overlap_cpu_optimizer_d2h_h2d": True}, id="all, overlap"),
    pytest.param(
        {"optimizer_offload_fraction": 0.5, "use_precision_aware_optimizer": True}, id="half, precision-aware"
    ),
    pytest.param({"optimizer_offload_fraction": 1.0, "use_precision_aware_optimizer": True}, id="all, precision-aware"),
]


def _config(directory, run, optimizer, **checkpoint):
    # Dropout makes the random states matter, warm-up and decay the schedule's.
    cfg = tiny_config(
        directory,
        train_iters=STEPS,
        model={"hidden_dropout": 0.1},
        optimizer={"optimizer_cpu_offload": True, **optimizer},
        scheduler={"lr_warmup_iters": 2, "lr_decay_iters": 10},
        dataset={"dataloader_type": "cyclic"},
        checkpoint={
            "save": f"{directory}/{run}",
            "pretrained_checkpoint": f"{directory}/pretrained",
            **checkpoint,
        },
    )
    return cfg


def _train_through(directory, run, optimizer, save_interval):
    return run_finetune(_config(directory, run, optimizer, save_interval=save_interval))


def _resume(directory, run, optimizer, step):
    return run_finetune(_config(directory, run, optimizer, save=None, load=f"{directory}/{run}", ckpt_step=step))


def _resume_with_stock_core(directory, run, optimizer, step):
    from megatron.bridge.training import optim

    ours, optim.install_repairs = optim.install_repairs, lambda optimizer: []
    try:
        return _resume(directory, run, optimizer, step)
    finally:
        optim.install_repairs = ours


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    run_on_ranks(make_pretrained, 2, path / "pretrained")
    return path


@pytest.mark.parametrize("optimizer", CELLS)
def test_resumed_run_equals_the_uninterrupted_one(directory, request, optimizer):
    run = request.node.callspec.id.replace(" ", "").replace(",", "-")
    whole = run_on_ranks(_train_through, 2, directory, run, optimizer, 2)
    for step in (2, 4):
        resumed = run_on_ranks(_resume, 2, directory, run, optimizer, step)
        for uninterrupted, continued in zip(whole, resumed, strict=True):
            assert continued.losses == uninterrupted.losses[step:]
            assert continued.learning_rates == uninterrupted.learning_rates[step:]
            assert differing(continued.weights_after, uninterrupted.weights_after) == {}
            assert continued.train_state == uninterrupted.train_state
            assert differing(continued.weights_before, continued.weights_after) != {}


OFF, ALL = {"optimizer_cpu_offload": False}, {"optimizer_offload_fraction": 1.0}
HALF = {"optimizer_offload_fraction": 0.5}


@pytest.mark.parametrize(("before", "after"), [(OFF, ALL), (ALL, OFF), (ALL, HALF)], ids=["on", "off", "half"])
def test_offload_may_change_on_the_way(directory, request, before, after):
    """On the CPU the offloaded optimizer computes the same bits, so the run must go on as if nothing had changed."""
    run = f"change-{request.node.callspec.id}"
    whole = run_on_ranks(_train_through, 2, directory, run, before, 2)
    for uninterrupted, continued in zip(whole, run_on_ranks(_resume, 2, directory, run, after, 2), strict=True):
        assert continued.losses == uninterrupted.losses[2:]
        assert differing(continued.weights_after, uninterrupted.weights_after) == {}


@pytest.mark.parametrize("optimizer", [CELLS[0], CELLS[3]])
def test_stock_core_does_not(directory, request, optimizer):
    run = "stock-" + request.node.callspec.id.replace(" ", "").replace(",", "-")
    whole = run_on_ranks(_train_through, 2, directory, run, optimizer, 2)
    try:
        resumed = run_on_ranks(_resume_with_stock_core, 2, directory, run, optimizer, 2)
    except RankError as error:
        assert "KeyError" in str(error) or "assert len(steps) == 1" in str(error)
        return
    assert resumed[0].losses != whole[0].losses[2:]
