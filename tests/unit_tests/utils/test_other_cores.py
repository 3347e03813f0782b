# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Options that only another Core has: dropped at the default that they have there, refused otherwise."""

import dataclasses
import json
import logging

import pytest
from megatron.core.distributed import DistributedDataParallelConfig as CoreDistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import DistributedDataParallelConfig, OptimizerConfig
from megatron.bridge.utils import other_cores
from megatron.bridge.utils.overrides import apply_mapping, apply_overrides
from megatron.bridge.utils.yaml_io import ConfigFileError, from_yaml_dict, to_yaml_dict

OURS = {
    GPTModelProvider: TransformerConfig,
    OptimizerConfig: CoreOptimizerConfig,
    DistributedDataParallelConfig: CoreDistributedDataParallelConfig,
}


def _installed_and_other(core_class):
    """The table's options that this Core has, and those that it lacks."""
    fields = {field.name: field for field in dataclasses.fields(core_class)}
    tables = [table[core_class.__name__] for table in (other_cores._NEWER, other_cores._OLDER)]
    here, absent = tables if all(name in fields for name in tables[0]) else reversed(tables)
    return {name: (default, fields[name]) for name, default in here.items()}, absent, fields


@pytest.mark.parametrize("core_class", OURS.values(), ids=lambda cls: cls.__name__)
def test_the_table_is_that_of_the_two_cores(core_class):
    here, absent, fields = _installed_and_other(core_class)
    assert here
    assert {name: field.default for name, (_, field) in here.items()} == {
        name: default for name, (default, _) in here.items()
    }
    assert not set(absent) & set(fields)


@pytest.mark.parametrize("ours", OURS, ids=lambda cls: cls.__name__)
def test_a_default_of_another_core_is_dropped_wherever_it_is_given(ours, caplog):
    _, absent, _ = _installed_and_other(OURS[ours])
    needed = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2} if ours is GPTModelProvider else {}
    made = ours(**needed, **absent)
    for name, default in absent.items():
        setattr(made, name, default)
    read = from_yaml_dict({**to_yaml_dict(ours(**needed)), **to_yaml_dict(absent)}, expected=ours)
    plain = {name: default for name, default in absent.items() if isinstance(default, int | str | None)}
    apply_overrides(read, [f"{name}={json.dumps(default)}" for name, default in plain.items()])
    apply_mapping(read, plain)
    assert not set(absent) & set(vars(made))
    assert not set(absent) & set(vars(read))
    assert not caplog.records


def test_another_value_is_refused_with_the_version_that_has_the_option(caplog):
    name = next(iter(_installed_and_other(CoreDistributedDataParallelConfig)[1]))
    section, wrong = DistributedDataParallelConfig(), f"{name} on megatron-core .* has it"
    with pytest.raises(AttributeError, match=wrong):
        setattr(section, name, 7)
    with pytest.raises(AttributeError, match=wrong):
        DistributedDataParallelConfig(**{name: 7})
    with pytest.raises(ValueError, match=wrong):
        apply_overrides(section, [f"{name}=7"])
    with pytest.raises(ValueError, match=wrong):
        apply_mapping(section, {name: 7})
    with pytest.raises(ConfigFileError, match=wrong):
        from_yaml_dict({name: 7}, expected=DistributedDataParallelConfig)
    with caplog.at_level(logging.WARNING):
        from_yaml_dict({name: 7}, expected=DistributedDataParallelConfig, strict=False)
    assert name in caplog.text


def test_a_switch_is_not_a_number():
    option = other_cores.OtherCoreOption("gtp_weight_remat_size", 1, "0.19.2")
    assert option.is_asked_for(True)
    assert not option.is_asked_for(1)


def test_what_no_core_has_stays_unknown():
    with pytest.raises(AttributeError, match="did you mean"):
        OptimizerConfig().weight_decayy = 1
