# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What isn't built yet is refused by name, and accepted where it asks for nothing."""

import dataclasses
import logging

import pytest

from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config_unsupported import UNSUPPORTED, check_options_are_built
from tests.unit_tests.training.config_examples import make_config


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: row.option)
def test_an_option_that_is_not_built_is_refused_and_its_accepted_values_are_not(row):
    *sections, name = row.option.split(".")
    for value in row.accepted:
        cfg = make_config("profiling={}")
        owner = getattr(cfg, sections[0]) if sections else cfg
        setattr(owner, name, value)
        check_options_are_built(cfg, 1)

    cfg = make_config("profiling={}")
    owner = getattr(cfg, sections[0]) if sections else cfg
    assert name in {field.name for field in dataclasses.fields(owner)}
    setattr(owner, name, "something else")
    with pytest.raises(ValueError, match="is not built yet: ") as error:
        check_options_are_built(cfg, 1)
    assert str(error.value).startswith(f"{row.option}=something else")
    assert not str(error.value).endswith(": ")


def test_a_communication_overlap_that_is_off_is_accepted():
    cfg = make_config()
    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False, overlap_grad_reduce=False)
    cfg.validate(1)


def test_options_that_only_show_more_are_accepted_and_named(caplog):
    caplog.set_level(logging.INFO)
    make_config("logger.log_params_norm=true", "logger.log_energy=true").validate(1)
    assert "without effect, not built yet: logger.log_params_norm, logger.log_energy" in caplog.text
