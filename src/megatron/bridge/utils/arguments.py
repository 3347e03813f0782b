# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Arguments that a function has for scripts' sake, and can't honour."""

from typing import Any


def refuse_arguments(**arguments: Any) -> None:
    """Refuse arguments that ask for something; None and False don't.

    Raises:
        ValueError: Names the argument.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r} is not supported: leave it out")
