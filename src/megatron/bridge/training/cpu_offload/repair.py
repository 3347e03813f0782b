# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A repair of Megatron-Core's optimizers: what it mends, since when, and the override that does it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Repair:
    """One defect of Core's and the mixin that overrides the methods it sits in."""

    name: str
    """Short name, for the log."""

    defect: str
    """What goes wrong without it, in one sentence."""

    threads: tuple[str, ...]
    """Public threads that report it; none where we found it first."""

    core_versions: str
    """Versions in which it was found."""

    target: type
    """Core's class that is overridden."""

    subclass: Callable[[type], type]
    """Makes, of `target` or a subclass of it, a subclass with the overrides. Adds no slots: instances change class."""

    is_needed: Callable[[Any], bool]
    """Whether this optimizer, in the installed Core, has the defect: asked of its source or state, not its version."""
