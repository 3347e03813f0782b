# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""No option passes without a word: each is read, or refused, or named in the log as one without effect."""

import dataclasses
import enum
import logging
import typing
from pathlib import Path

import pytest
import torch

import megatron.bridge.training.config as config
from megatron.bridge.data.sft_options import PackedSequenceSpecs, SFTOptions
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.config.comm_overlap import CommOverlapConfig
from megatron.bridge.utils.field_types import field_hints, members_of
from megatron.bridge.utils.unbuilt_options import OF_NO_USE, UNSUPPORTED
from tests.rigs.config_examples import make_config
from tests.rigs.option_readers import Readers

SECTIONS = {
    "train": config.TrainingConfig,
    "validation": config.ValidationConfig,
    "scheduler": config.SchedulerConfig,
    "rng": config.RNGConfig,
    "dist": config.DistributedInitConfig,
    "rerun_state_machine": config.RerunStateMachineConfig,
    "logger": config.LoggerConfig,
    "checkpoint": config.CheckpointConfig,
    "profiling": config.ProfilingConfig,
    "tokenizer": config.TokenizerConfig,
    "comm_overlap": CommOverlapConfig,
    "ft": config.FaultToleranceConfig,
    "nvrx_straggler": config.NVRxStragglerDetectionConfig,
    "inprocess_restart": config.InProcessRestartConfig,
    "mixed_precision": config.MixedPrecisionConfig,
    "peft": (LoRA, DoRA, CanonicalLoRA),
    "dataset": (config.GPTSFTDatasetConfig, config.GPTDatasetConfig, config.MockGPTDatasetConfig),
    "dataset.dataset_kwargs": SFTOptions,
    "dataset.offline_packing_specs": PackedSequenceSpecs,
    "model": GPTModelProvider,
}
WHOLE = "straggler tensor_inspect".split()
"""Sections that are refused whole."""


def _own_fields(cls):
    """Fields that this package defines, not Megatron-Core, and that a user may set."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("megatron.bridge")]
    named = {name for base in own for name in base.__dict__.get("__annotations__", {})}
    return {name: hint for name, hint in field_hints(cls).items() if name in named}


OPTIONS = [
    (section, cls, name)
    for section, classes in SECTIONS.items()
    for cls in (classes if isinstance(classes, tuple) else (classes,))
    for name in _own_fields(cls)
]
LISTED = [row.option for row in (*UNSUPPORTED, *OF_NO_USE)]


@pytest.fixture(scope="module")
def read():
    """The options that something reads, as `(class, name)`."""
    fields = {cls.__name__: {field.name for field in dataclasses.fields(cls)} for _, cls, _ in OPTIONS}
    bases = {base.__name__: base for _, cls, _ in OPTIONS for base in cls.__mro__ if dataclasses.is_dataclass(base)}
    fields |= {
        name: {field.name for field in dataclasses.fields(base)}
        for name, base in bases.items()
        if base.__module__.startswith("megatron.bridge")
    }
    sections = {}
    for section, cls, _ in OPTIONS:
        sections.setdefault(section.rpartition(".")[2], set()).add(cls.__name__)
    sections |= {"optimizer": set(), "ddp": set()}  # Core's own
    source = Path(config.__file__).parents[2]
    found = Readers(source, sections, fields).found
    # what a method of a base class reads, each class has
    return {(cls.__name__, name) for _, cls, name in OPTIONS for base in cls.__mro__ if (base.__name__, name) in found}


def test_the_readers_are_found(read):
    assert ("TrainingConfig", "train_iters") in read and ("CheckpointConfig", "save") in read
    assert ("TrainingConfig", "manual_gc_eval") in read  # in a method of the loop, of an argument without its class
    assert ("ProfilingConfig", "record_shapes") in read
    assert ("DistributedInitConfig", "local_rank") not in read  # and so has a module
    assert ("MixedPrecisionConfig", "hysteresis") in read  # by getattr
    assert ("CheckpointConfig", "replication") not in read
    assert ("DistributedInitConfig", "use_gloo_process_groups") in read


def _other_values(hint, default):
    """Values of the type that aren't the default."""
    for member in members_of(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is typing.Literal:
            yield from (choice for choice in arguments if choice != default)
        elif member is bool:
            yield not default
        elif member in (int, float):
            yield member(default + 1 if isinstance(default, int | float) else 1)
        elif member is str or member is typing.Any:
            yield "other"
        elif (origin or member) is dict:
            yield {"other": 1}
        elif (origin or member) in (list, tuple):
            yield [1]
        elif member is torch.dtype:
            yield torch.float64
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            yield next(choice for choice in member if choice is not default)


def _config_with(section, cls, name):
    """A configuration that holds another value than the default, and the value."""
    cfg = make_config("profiling={}", "comm_overlap={}", "mixed_precision=bf16_mixed")
    field = cls.__dataclass_fields__[name]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = next(_other_values(_own_fields(cls)[name], default))
    if section == "dataset.dataset_kwargs":
        cfg.dataset.dataset_kwargs = {name: value}
        return cfg, value
    if section == "dataset.offline_packing_specs":
        cfg.dataset.enable_offline_packing = True
        cfg.dataset.offline_packing_specs = PackedSequenceSpecs(**{name: value})
        return cfg, value
    if section == "peft":
        cfg.peft = cls()
    if section == "dataset" and not isinstance(cfg.dataset, cls):
        cfg.dataset = cls(seq_length=32)
    setattr(getattr(cfg, section), name, value)
    return cfg, value


@pytest.mark.parametrize(("section", "cls", "name"), OPTIONS, ids=lambda part: getattr(part, "__name__", part))
def test_an_option_is_read_or_refused_or_named_in_the_log(section, cls, name, read, caplog):
    option = f"{section}.{name}"
    if (cls.__name__, name) in read:
        return
    cfg, value = _config_with(section, cls, name)
    caplog.set_level(logging.INFO)
    try:
        config.runtime_config_update(cfg)
    except ValueError as error:
        assert name in str(error), f"{option}={value!r} is refused by an error that doesn't name it: {error}"
        return
    said = [text for text in caplog.messages if "without effect" in text and option in text]
    assert said, f"{option}={value!r} is neither read nor refused nor named in the log: build it, or list it"


def test_what_is_listed_as_without_effect_is_no_field():
    fields = {f"{section}.{name}" for section, _, name in OPTIONS}
    assert fields & set(LISTED) == {"checkpoint.non_persistent_ckpt_type"}  # two of its values work


@pytest.mark.parametrize("name", WHOLE)
def test_a_section_that_is_not_built_is_refused(name):
    cfg = make_config()
    setattr(cfg, name, object())
    with pytest.raises(ValueError, match=f"{name}=.* is not built yet"):
        config.runtime_config_update(cfg)


def test_every_section_is_looked_at():
    cores = {"optimizer", "ddp"}
    others = {"optimizer_config_override_provider", "env_vars"}  # read where they are called; no fields
    named = {field.name for field in dataclasses.fields(config.ConfigContainer) if field.init and field.repr}
    assert named == {*SECTIONS, *cores, *others} - {name for name in SECTIONS if "." in name}


def test_a_default_is_not_named(caplog):
    caplog.set_level(logging.INFO)
    config.runtime_config_update(make_config("profiling={}"))
    assert "without effect" not in caplog.text
