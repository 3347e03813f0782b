# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import logging
from dataclasses import replace

import pytest

from megatron.bridge.training.config.update import count_steps_left, derive_from_data, runtime_config_update
from tests.rigs.tiny import tiny_config


def _with_epochs(tmp_path, epochs, **sections):
    cfg = tiny_config(tmp_path, **sections)
    cfg.train.train_iters, cfg.train.num_epochs = None, epochs
    return cfg


def test_epochs_follow_without_a_gap_and_what_is_left_is_said(tmp_path, caplog):
    cfg = _with_epochs(tmp_path, 3, scheduler={"lr_decay_iters": None, "lr_warmup_fraction": 0.25})
    runtime_config_update(cfg)
    with caplog.at_level(logging.INFO):
        derived = derive_from_data(cfg, train_samples=13)
    assert (derived.train_iters, derived.train_samples) == (4, 32)  # 39 samples in batches of 8
    assert (
        (derived.lr_decay_steps, derived.lr_warmup_steps)
        == (32, 8)
        == (
            cfg.scheduler.lr_decay_steps,
            cfg.scheduler.lr_warmup_steps,
        )
    )
    assert caplog.messages == [
        "train.num_epochs=3 over 13 samples: 4 steps of 8; the last 7 make no whole global batch and are left out"
    ]
    assert (cfg.train.num_epochs, cfg.train.train_iters) == (3, None)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert derive_from_data(cfg, train_samples=16, unit="packs").train_iters == 6
    assert caplog.messages == ["train.num_epochs=3 over 16 packs: 6 steps of 8"]


@pytest.mark.parametrize("length", [{"num_epochs": 2}, {"train_samples": 400}])
def test_what_is_left_of_a_resumed_run_is_counted_in_samples(tmp_path, length):
    cfg = tiny_config(tmp_path, scheduler={"lr_decay_iters": None})
    cfg.train.train_iters = None
    for name, value in length.items():
        setattr(cfg.train, name, value)
    runtime_config_update(cfg)
    derived = derive_from_data(cfg, train_samples=200)

    def last_step(step, consumed):
        counted = count_steps_left(cfg, derived, step=step, consumed_samples=consumed, samples_per_epoch=200)
        assert counted == replace(derived, train_iters=counted.train_iters)
        return counted.train_iters

    assert derived.train_iters == last_step(0, 0) == last_step(10, 80) == 50
    assert [last_step(10, consumed) for consumed in (40, 160, 397, 480)] == [55, 40, 10, 10]
    cfg.train.train_iters = 50
    assert last_step(10, 40) == 50


def test_without_epochs_the_data_changes_nothing(tmp_path):
    cfg = tiny_config(tmp_path)
    runtime_config_update(cfg)
    assert derive_from_data(cfg, train_samples=None) == derive_from_data(cfg, train_samples=5) == cfg.derive()


@pytest.mark.parametrize(
    ("epochs", "samples", "warmup", "message"),
    [
        (2, None, 0, "train.num_epochs=2 without training data"),
        (2, 3, 0, r"train.num_epochs=2 over 3 samples: fewer than one global batch \(train.global_batch_size=8\)"),
        (2, 16, 4, "scheduler.lr_warmup_iters=4 but the learning rate decays over 4 iters"),
    ],
)
def test_epochs_that_make_no_run_are_refused(tmp_path, epochs, samples, warmup, message):
    cfg = _with_epochs(tmp_path, epochs, scheduler={"lr_decay_iters": None, "lr_warmup_iters": warmup})
    runtime_config_update(cfg)
    with pytest.raises(ValueError, match=message):
        derive_from_data(cfg, train_samples=samples)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_epochs": 0}, "train.num_epochs is 0"),
        ({"num_epochs": 2, "train_iters": 5}, "train.train_iters=5 and train.num_epochs=2 are both set"),
        ({"num_epochs": 2, "train_samples": 5, "train_iters": 5}, "are all set"),
    ],
)
def test_a_run_has_one_length(tmp_path, fields, message):
    cfg = tiny_config(tmp_path)
    cfg.train.train_iters = None
    for name, value in fields.items():
        setattr(cfg.train, name, value)
    with pytest.raises(ValueError, match=message):
        runtime_config_update(cfg)


def test_a_schedule_in_samples_is_refused_with_epochs(tmp_path):
    cfg = _with_epochs(tmp_path, 2, scheduler={"lr_decay_iters": None, "lr_decay_samples": 100})
    with pytest.raises(ValueError, match="lr_decay_samples=100 in a run whose length is train.num_epochs"):
        runtime_config_update(cfg)
