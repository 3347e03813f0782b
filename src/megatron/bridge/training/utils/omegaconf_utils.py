# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the function that applies a YAML file and command-line overrides to a configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from megatron.bridge.utils.overrides import apply_mapping, apply_overrides
from megatron.bridge.utils.yaml_io import ConfigFileError, load_yaml

__all__ = ["process_config_with_overrides"]

ConfigT = TypeVar("ConfigT")


def process_config_with_overrides(
    config: ConfigT, config_filepath: str | Path | None = None, cli_overrides: Sequence[str] | None = None
) -> ConfigT:
    """Set options from a YAML file, then from the command line, which wins.

    Args:
        config: A configuration, such as a recipe returns; changed in place.
        config_filepath: YAML with the sections and options to set; it need not be complete. None: no file.
        cli_overrides: Overrides such as `train.train_iters=50`. None: no overrides.

    Returns:
        The same configuration.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown option or a value of the wrong type. Names the option, and the file if there is one.
    """
    if config_filepath is not None:
        values = load_yaml(config_filepath)
        if not isinstance(values, Mapping):
            raise ConfigFileError(f"{config_filepath} holds {type(values).__name__}: expected options by section")
        try:
            apply_mapping(config, values)
        except ValueError as error:
            raise ConfigFileError(f"{config_filepath}: {error}") from error
    return apply_overrides(config, cli_overrides or ())
