# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""How long the optimizer's schedule is, and who says so."""

from types import SimpleNamespace

import pytest

from megatron.bridge.training.config import SchedulerConfig, runtime_config_update
from megatron.bridge.training.config.scheduler import SCHEDULE_LENGTHS
from megatron.bridge.training.optim import build_scheduler, setup_optimizer
from tests.rigs.config_examples import make_config


def _lengths(scheduler):
    return [getattr(scheduler, name) for name in SCHEDULE_LENGTHS]


def test_the_schedule_is_as_long_as_derived_says_and_scripts_are_shown():
    cfg = make_config("scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=5")
    runtime_config_update(cfg)
    groups = SimpleNamespace(param_groups=[{}])
    shown = build_scheduler(groups, cfg.optimizer, cfg.scheduler, cfg.scheduler)
    assert _lengths(shown) == _lengths(cfg.derive()) == [160, 16, 160, 40]
    of_other_size = make_config("train.global_batch_size=16", "scheduler.lr_wsd_decay_iters=5").derive()
    longer = build_scheduler(groups, cfg.optimizer, cfg.scheduler, of_other_size)
    assert _lengths(longer) == [320, 32, 320, 80]


def test_weight_decay_goes_from_its_start_to_its_end():
    cfg = make_config(
        "scheduler.start_weight_decay=0.0", "optimizer.weight_decay=0.25", "scheduler.weight_decay_incr_style=linear"
    )
    schedule = build_scheduler(SimpleNamespace(param_groups=[{}]), cfg.optimizer, cfg.scheduler, cfg.derive(1))
    assert (schedule.start_wd, schedule.end_wd) == (0.0, 0.25)


@pytest.mark.parametrize("iters", [0, 1])
def test_an_evaluation_alone_has_a_schedule_whatever_the_warm_up(iters):
    cfg = make_config("validation.skip_train=true", f"train.train_iters={iters}", "scheduler.lr_decay_iters=null")
    runtime_config_update(cfg)
    assert cfg.derive().lr_warmup_steps >= cfg.derive().lr_decay_steps
    build_scheduler(SimpleNamespace(param_groups=[{}]), cfg.optimizer, cfg.scheduler, cfg.derive())


def test_a_schedule_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match=r"scheduler.lr_decay_steps is None.*runtime_config_update\(cfg\)"):
        setup_optimizer(make_config().optimizer, SchedulerConfig(), [])
