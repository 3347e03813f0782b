# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The rules across sections of a configuration: one function a rule, named after it. A rule reads and never changes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

RULES: tuple[Callable[["ConfigContainer", int], None], ...] = ()
