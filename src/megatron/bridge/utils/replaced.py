# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Stand-ins for a while: names of a module, a class or an object that are put back afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, **stand_ins: Any) -> Iterator[None]:
    """Inside, names of `owner` have other values; afterwards, also after an error, they are as they were.

    What `owner` inherited it inherits again, and a static or class method of a class stays one.

    Args:
        owner: A module, a class or an object.
        stand_ins: The values, by name.

    Raises:
        AttributeError: `owner` has no such name; nothing is replaced.
    """
    for name in stand_ins:
        getattr(owner, name)
    own = {name: vars(owner)[name] for name in stand_ins if name in vars(owner)}
    try:
        for name, value in stand_ins.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in stand_ins:
            if name in own:
                setattr(owner, name, own[name])
            elif name in vars(owner):
                delattr(owner, name)
