# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a run.

cfg = ConfigContainer(model=..., train=TrainingConfig(...), ...)
runtime_config_update(cfg)   # resolves mixed precision and deprecated names, then validates
derived = cfg.derive()       # frozen: data-parallel size, micro-batches, schedule lengths
"""

import dataclasses
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import derived as config_derived
from megatron.bridge.training.config.derived import DerivedConfig
from megatron.bridge.training.config.precedence import forget_what_agrees
from megatron.bridge.training.config.rules import RULES
from megatron.bridge.training.config.rules.optimizer import log_what_is_offloaded
from megatron.bridge.training.config.scheduler import SCHEDULE_LENGTHS
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.training.config.unsupported import log_options_without_effect
from megatron.bridge.utils import distributed
from megatron.bridge.utils.yaml_io import ConfigFileError, dump_yaml, from_yaml_dict, load_yaml, to_yaml_dict

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ConfigContainer(RunSections):
    """Everything that a run is told, and what can be done with it."""

    data_parallel_size: int | None = field(init=False, default=None, repr=False)
    """Copies of the model, for scripts; the run reads `derive()`. Shown by `validate` and
    set_data_parallel_size; None before."""

    def __post_init__(self) -> None:
        """What agrees with `mixed_precision` now follows it when it is changed."""
        forget_what_agrees(self)

    def get_data_parallel_size(self, world_size: int) -> int:
        """Copies of the model on this many ranks.

        Raises:
            ValueError: The parallel sizes don't divide the number of ranks.
        """
        return config_derived.data_parallel_size(self, world_size)

    def set_data_parallel_size(self, world_size: int | None = None) -> None:
        """Show `data_parallel_size`. None: for the ranks of this run."""
        self.data_parallel_size = self.get_data_parallel_size(world_size or distributed.world_size())

    def derive(self, world_size: int | None = None) -> DerivedConfig:
        """What follows from the configuration, frozen. None: for the ranks of this run."""
        return config_derived.derive(self, world_size or distributed.world_size())

    def validate(self, world_size: int | None = None) -> None:
        """Check everything before anything is built.

        First each section's own fields, then the rules across sections, then Core's classes finish themselves
        (`finalize()`), so that a rule that names the option speaks before a bare assertion of Core's.

        Args:
            world_size: Ranks of the run. None: those of this process's group, or torchrun's, or 1.

        Raises:
            ValueError: One line with the option, what it holds, what is expected, and the way out.
        """
        ranks = world_size or distributed.world_size()
        for name in ("train", "validation", "scheduler", "rng", "dist", "logger", "checkpoint"):
            getattr(self, name).finalize()
        if self.profiling is not None:
            self.profiling.finalize()
        for rule in RULES:
            rule(self, ranks)
        for section in (self.optimizer, self.ddp, self.model, self.dataset, self.tokenizer):
            section.finalize()
        log_what_is_offloaded(self)
        log_options_without_effect(self)
        self.show(self.derive(ranks))

    def show(self, derived: DerivedConfig) -> None:
        """Show scripts, in the sections, what follows from the configuration; the run itself reads `derived`."""
        self.data_parallel_size = derived.data_parallel_size
        for name in SCHEDULE_LENGTHS:
            setattr(self.scheduler, name, getattr(derived, name))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dictionaries with `_target_`."""
        return to_yaml_dict(self)

    def to_yaml(self, yaml_path: str | Path | None = None) -> str:
        """Write the configuration as YAML and return the text. None: only return it."""
        return dump_yaml(self, yaml_path)

    def print_yaml(self) -> None:
        """Show the configuration as YAML on standard output."""
        sys.stdout.write(self.to_yaml())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *, strict: bool = True) -> "ConfigContainer":
        """The configuration that `to_dict` described.

        Args:
            config_dict: Dictionaries with `_target_`; sections may leave it out where their class is known.
            strict: Refuse unknown fields and values that weren't saved. False: leave them at their defaults.

        Raises:
            ConfigFileError: An unknown name or field, or a value of the wrong type; it says where.
        """
        read = from_yaml_dict(config_dict, expected=cls, strict=strict)
        if not isinstance(read, cls):
            raise ConfigFileError(f"config is a {type(read).__name__}: expected a {cls.__name__}")
        return read

    @classmethod
    def from_yaml(cls, yaml_path: str | Path, *, strict: bool = True) -> "ConfigContainer":
        """The configuration in a YAML file; see `from_dict`.

        Raises:
            FileNotFoundError: There is no such file.
            ConfigFileError: The file can't be read as a configuration; it says where.
        """
        try:
            return cls.from_dict(load_yaml(yaml_path), strict=strict)
        except ConfigFileError as error:
            raise ConfigFileError(f"{yaml_path}: {error}") from error

    def log_non_default_values(self) -> None:
        """Log the fields that differ from their class's defaults."""
        for name in [entry.name for entry in dataclasses.fields(self)]:
            changed = _non_default_values(getattr(self, name))
            if changed:
                shown = ", ".join(f"{key}={value!r}" for key, value in changed.items())
                logger.info("%s: %s", name, re.sub(r" at 0x[0-9a-f]+", "", shown))


def _non_default_values(section: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults; a field without a default always does."""
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        return {}
    changed = {}
    for entry in dataclasses.fields(section):
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        value = getattr(section, entry.name, None)
        if entry.init and entry.repr and value is not default and value != default:
            changed[entry.name] = value
    return changed
