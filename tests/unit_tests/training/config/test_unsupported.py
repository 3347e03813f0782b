# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What isn't built yet is refused by name, and accepted where it asks for nothing."""

import dataclasses
import logging

import pytest

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config.unsupported import UNSUPPORTED, check_options_are_built
from tests.rigs.config_examples import make_config


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: row.option)
def test_an_option_that_is_not_built_is_refused_and_its_accepted_values_are_not(row):
    *sections, name = row.option.split(".")
    if sections == ["model"] and name not in GPTModelProvider.__dataclass_fields__:
        pytest.skip("this Core has no such field")
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
    make_config(
        "logger.log_max_attention_logit=true", "logger.log_energy=true", "dataset.data_sharding=false"
    ).validate(1)
    assert (
        "accepted without effect, not built yet: logger.log_max_attention_logit, logger.log_energy; "
        "of no use here: dataset.data_sharding"
    ) in caplog.messages


@pytest.mark.parametrize(
    "override", ["model.mtp_num_layers=1", "model.qk_clip=true", "model.multi_latent_attention=true"]
)
def test_what_core_would_take_in_silence_is_refused(override):
    with pytest.raises(ValueError, match=f"{override.partition('=')[0]}=.* is not built yet"):
        make_config(override).validate(1)
