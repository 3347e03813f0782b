# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Names from before modules moved: they are imported, and found in recorded configurations, as they were."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import yaml

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.moved_modules import MOVED
from megatron.bridge.utils.targets import class_named, name_of

RECORDED = Path(__file__).parent / "recorded" / "run_config.yaml"
"""Written before the move, with every section filled, by `ConfigContainer.to_yaml`."""


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_imports_the_module_itself(old):
    module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__.name == module.__name__ == MOVED[old], "it isn't renamed by that"
    assert importlib.util.find_spec(old) is not None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("config_sections", "TrainingConfig"),
        ("config_sections", "SchedulerConfig"),
        ("config_processes", "RNGConfig"),
        ("config_logging", "LoggerConfig"),
        ("config_optimizer", "OptimizerConfig"),
        ("config_checkpoint", "CheckpointConfig"),
        ("config", "ValidationConfig"),
        ("mixed_precision", "MixedPrecisionConfig"),
        ("comm_overlap", "CommOverlapConfig"),
    ],
)
def test_a_file_may_name_a_class_as_before(module, name):
    found = class_named(f"megatron.bridge.training.{module}.{name}")
    assert found is not None and found.__name__ == name
    assert class_named(name_of(found)) is found


def test_a_recorded_configuration_is_read_and_written_under_the_same_names(tmp_path):
    read = ConfigContainer.from_yaml(RECORDED, strict=False)  # Core versions differ in fields
    read.to_yaml(tmp_path / "again.yaml")
    recorded, again = (yaml.safe_load(path.read_text()) for path in (RECORDED, tmp_path / "again.yaml"))
    assert len(set(_targets(recorded))) > 15
    assert [pair for pair in _targets(recorded) if pair not in _targets(again)] == []


def _targets(node, path=()):
    """Where which class is named."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node["_target_"]
        for key, value in node.items():
            yield from _targets(value, (*path, key))
