# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What Core has built gets overrides of ours, in place."""

from typing import Any


def mix_in(built: Any, mixin: type) -> None:
    """Change an object's class to a subclass of it that has a mixin's overrides first; once, and under its old name."""
    cls = type(built)
    if not issubclass(cls, mixin):
        built.__class__ = type(cls.__name__, (mixin, cls), {})
