# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Checks on one field's value, which the sections' `finalize()` share."""


def require_positive(section: str, **values: int | None) -> None:
    """Raise when a number that counts something is set and smaller than one."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{section}.{name} is {value}: it must be at least 1; set a positive number")


def require_not_negative(section: str, **values: float | None) -> None:
    """Raise when a number is set and negative."""
    for name, value in values.items():
        if value is not None and value < 0:
            raise ValueError(f"{section}.{name} is {value}: it can't be negative; set 0 or more")
