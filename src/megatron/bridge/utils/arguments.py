# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Arguments that a function has for scripts' sake, and can't honour."""

from typing import Any

from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection


def refuse_arguments(**arguments: Any) -> None:
    """Refuse arguments that ask for something; None and False don't.

    Raises:
        ValueError: Names the argument.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r} is not supported: leave it out")


def refuse_other_groups(pg_collection: ProcessGroupCollection | None) -> None:
    """Refuse process groups that aren't those of Core's global state.

    Raises:
        ValueError: They aren't.
    """
    if pg_collection is not None and pg_collection.dp is not mpu.get_data_parallel_group():
        raise ValueError("pg_collection has groups of its own: leave it out, or initialize model parallelism with them")
