# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What isn't built yet is refused by name, and accepted where it asks for nothing."""

import copy
import dataclasses
import inspect
import logging
import pickle

import pytest

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedInitConfig,
    FaultToleranceConfig,
    InProcessRestartConfig,
    NVRxStragglerDetectionConfig,
    TrainingConfig,
    runtime_config_update,
)
from megatron.bridge.training.config.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config.unsupported import check_options_are_built
from megatron.bridge.utils.unbuilt_options import OF_NO_USE, UNSUPPORTED
from tests.rigs.config_examples import make_config

STILL_FIELDS = ("checkpoint.non_persistent_ckpt_type",)
"""Options of which some values work; Core's classes hold what they hold."""


def _owner(cfg, option):
    """The section that has an option, and its name there."""
    section, _, name = option.rpartition(".")
    return getattr(cfg, section) if section else cfg, name


@pytest.fixture(scope="module")
def whole():
    """A configuration with all sections."""
    return make_config("profiling={}", "comm_overlap={}", "ft={}", "nvrx_straggler={}", "inprocess_restart={}")


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: row.option)
def test_an_option_that_is_not_built_is_refused_and_its_accepted_values_are_not(row, whole):
    cfg = copy.deepcopy(whole)
    owner, name = _owner(cfg, row.option)
    is_cores = row.option.startswith(("model.", "ddp."))
    if is_cores and name not in type(owner).__dataclass_fields__:
        assert isinstance(owner, GPTModelProvider)
        pytest.skip("this Core has no such field")
    is_field = name in {field.name for field in dataclasses.fields(owner)}
    assert is_field == (is_cores or row.option in STILL_FIELDS)
    if not is_field:
        assert getattr(owner, name) == row.accepted[0] and not hasattr(owner, name + "_")
    for value in row.accepted:
        setattr(owner, name, value)
        assert getattr(owner, name) == value
        check_options_are_built(cfg, 1)

    setattr(owner, name, "something else")
    with pytest.raises(ValueError, match="is not built yet: ") as error:
        check_options_are_built(cfg, 1)
    assert str(error.value).startswith(f"{row.option}=something else")
    assert not str(error.value).endswith(": ") and "\n" not in str(error.value)

    setattr(owner, name, row.accepted[0])
    assert is_cores or cfg == whole


ASKED = {
    "constructor": lambda value: TrainingConfig(micro_batch_size=1, train_iters=2, rampup_batch_size=value),
    "assignment": lambda value: _assigned(value),
    "replace": lambda value: dataclasses.replace(TrainingConfig(rampup_batch_size=value), train_iters=2),
    "deepcopy": lambda value: copy.deepcopy(TrainingConfig(rampup_batch_size=value)),
    "pickle": lambda value: pickle.loads(pickle.dumps(TrainingConfig(rampup_batch_size=value))),
}


def _assigned(value):
    train = TrainingConfig()
    train.rampup_batch_size = value
    return train


@pytest.mark.parametrize("way", ASKED)
def test_what_was_asked_for_is_never_lost(way, whole):
    train, neutral = ASKED[way]([2, 2, 8]), ASKED[way](None)
    assert train.rampup_batch_size == [2, 2, 8] and neutral.rampup_batch_size is None
    assert train != neutral and neutral == dataclasses.replace(neutral)
    assert train != dataclasses.replace(train, rampup_batch_size=None) == neutral
    cfg = copy.copy(whole)
    cfg.train = train
    read = ConfigContainer.from_dict(cfg.to_dict())
    for asking in (cfg, read):
        with pytest.raises(ValueError, match=r"^train.rampup_batch_size=\[2, 2, 8\] is not built yet: "):
            check_options_are_built(asking, 1)
    train.rampup_batch_size = None
    check_options_are_built(cfg, 1)


def test_a_recipes_choice_can_be_taken_back_on_the_command_line():
    wrong, right = "train.rampup_batch_size=[2, 2, 8]", "train.rampup_batch_size=null"
    with pytest.raises(ValueError, match=r"train.rampup_batch_size=\[2, 2, 8\] is not built yet"):
        runtime_config_update(make_config(wrong))
    cfg = make_config(wrong, right)
    runtime_config_update(cfg)
    assert "rampup_batch_size" not in cfg.to_dict()["train"]


def test_the_signature_shows_what_can_be_given():
    """NeMo-Run lets nothing else through."""
    for cls in (TrainingConfig, CheckpointConfig, ConfigContainer, CommOverlapConfig):
        fields = {field.name for field in dataclasses.fields(cls) if field.init} - {"_unbuilt"}
        shown = inspect.signature(cls).parameters
        assert fields < set(shown) or (not fields and shown)
        assert "_unbuilt" not in shown
    assert inspect.signature(TrainingConfig).parameters["rampup_batch_size"].default is None
    with pytest.raises(TypeError, match="micro_batchsize"):
        TrainingConfig(micro_batchsize=4)
    with pytest.raises(AttributeError, match="no option micro_batchsize: did you mean micro_batch_size"):
        _ = TrainingConfig().micro_batchsize


@pytest.mark.parametrize("row", OF_NO_USE, ids=lambda row: row.option)
def test_an_option_without_effect_is_no_field_and_has_its_default(row, whole):
    if row.option.startswith("dataset.") and row.option.count(".") > 1:
        return
    owner, name = _owner(whole, row.option)
    assert name not in type(owner).__dataclass_fields__ and getattr(owner, name) == row.neutral


def test_a_communication_overlap_that_is_off_is_accepted():
    cfg = make_config()
    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False, overlap_grad_reduce=False)
    cfg.validate(1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            FaultToleranceConfig(enable_ft_package=True),
            "ft.enable_ft_package=true is not built yet: start the job with",
        ),
        (
            FaultToleranceConfig(simulate_fault=True, simulated_fault_rank=1),
            "ft.simulate_fault=true is not built yet: ",
        ),
        (NVRxStragglerDetectionConfig(enabled=True), "nvrx_straggler.enabled=true is not built yet: set logger.timing"),
        (InProcessRestartConfig(enabled=True), "inprocess_restart.enabled=true is not built yet: start the job with"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_nvidias_resiliency_is_accepted_while_it_is_off_and_refused_by_name_where_it_is_on(section, message, whole):
    cfg = copy.copy(whole)
    check_options_are_built(cfg, 1)
    setattr(cfg, section._section, section)
    with pytest.raises(ValueError, match=f"^{message}"):
        cfg.validate(1)


def test_options_of_no_use_are_accepted_and_named(caplog):
    caplog.set_level(logging.INFO)
    make_config("dataset.data_sharding=false").validate(1)
    assert "accepted without effect, of no use here: dataset.data_sharding" in caplog.messages


def test_an_option_without_effect_has_a_type(whole):
    cfg = copy.copy(whole)
    cfg.dist = DistributedInitConfig(local_rank="first")
    with pytest.raises(ValueError, match="dist.local_rank is first .*: expected "):
        cfg.validate(1)
    with pytest.raises(ValueError, match="checkpoint.async_strategy is best .*: expected one of nvrx, mcore"):
        make_config("checkpoint.async_strategy=best")


@pytest.mark.parametrize("override", ["model.mtp_num_layers=1", "model.qk_clip=true"])
def test_what_core_would_take_in_silence_is_refused(override):
    with pytest.raises(ValueError, match=f"{override.partition('=')[0]}=.* is not built yet"):
        make_config(override).validate(1)
