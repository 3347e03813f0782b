# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Options of Megatron Bridge that are not built here yet: asking for one is an error, never silence.

`utils/unbuilt_options.py` lists them.
"""

import logging
from collections.abc import Mapping
from typing import Any

from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.utils.field_types import fit
from megatron.bridge.utils.section import unbuilt_values
from megatron.bridge.utils.unbuilt_options import OF_NO_USE, UNSUPPORTED, Unsupported, WithoutEffect

logger = logging.getLogger(__name__)


def _value_of(cfg: RunSections, option: str) -> Any:
    """What an option holds; None in a section that is None, or where this Core has no such field."""
    value: Any = cfg
    for name in option.split("."):
        value = getattr(value, name, None)
    return value


def _is_asked_for(cfg: RunSections, row: WithoutEffect) -> bool:
    """Whether a section holds an option of this name that isn't its own, and another value than the default.

    Raises:
        ValueError: The value isn't of the option's type.
    """
    section, _, name = row.option.rpartition(".")
    asked = unbuilt_values(_value_of(cfg, section))
    if name in asked:
        fit(asked[name], row.hint, where=row.option)
    return name in asked


def log_options_without_effect(cfg: RunSections) -> None:
    """Name, in one line, the options that are set and change nothing."""
    asked = [row.option for row in OF_NO_USE if _is_asked_for(cfg, row)]
    if asked:
        logger.info("accepted without effect, of no use here: %s", ", ".join(asked))


def check_options_are_built(cfg: RunSections, world_size: int) -> None:
    """Nothing is asked for that isn't built."""
    for row in UNSUPPORTED:
        _check_row(row, _value_of(cfg, row.option))


def check_overrides_are_built(values: Mapping[str, Any]) -> None:
    """The same for single options, before there is a configuration.

    Args:
        values: What is asked for, by option: {"profiling.use_nsys_profiler": True}.
    """
    for row in UNSUPPORTED:
        if row.option in values:
            _check_row(row, values[row.option])


def _check_row(row: Unsupported, value: Any) -> None:
    if not any(value is accepted or value == accepted for accepted in row.accepted):
        way_out = row.instead or f"set {row.option}={_as_text(row.accepted[0])}"
        raise ValueError(f"{row.option}={_as_text(value)} is not built yet: {way_out}")


def _as_text(value: Any) -> str:
    """A value as an override would say it, on one line."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    return text or " ".join(str(value).split())[:80]
