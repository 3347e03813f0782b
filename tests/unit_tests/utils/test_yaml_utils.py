# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A dataclass as YAML, by the public name."""

import yaml

from megatron.bridge.training.config import RNGConfig
from megatron.bridge.utils.yaml_utils import dump_dataclass_to_yaml


def test_a_section_is_written_to_a_file_or_returned(tmp_path):
    text = dump_dataclass_to_yaml(RNGConfig(seed=7))
    assert yaml.safe_load(text)["seed"] == 7
    assert dump_dataclass_to_yaml(RNGConfig(seed=7), tmp_path / "rng.yaml") is None
    assert (tmp_path / "rng.yaml").read_text() == text
