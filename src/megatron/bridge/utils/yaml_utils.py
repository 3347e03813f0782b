# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of writing a configuration as YAML."""

from pathlib import Path
from typing import Any

import yaml

from megatron.bridge.utils.yaml_io import to_yaml_dict

__all__ = ["dump_dataclass_to_yaml"]


def dump_dataclass_to_yaml(obj: Any, filename: str | Path | None = None) -> str | None:
    """Write a dataclass as YAML, in the form of `run_config.yaml`.

    Args:
        obj: The dataclass.
        filename: File to write, replaced if it is there. None: no file.

    Returns:
        The text where there is no file to write.
    """
    text = yaml.safe_dump(to_yaml_dict(obj), sort_keys=False)
    if filename is None:
        return text
    Path(filename).write_text(text, encoding="utf-8")
    return None
