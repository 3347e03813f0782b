# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the process groups that a model was built with."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

__all__ = ["get_pg_collection"]


def get_pg_collection(model: Any) -> ProcessGroupCollection:
    """The process groups of a model: those of Core's global state, which all models here are built with.

    Args:
        model: This rank's chunks.
    """
    return ProcessGroupCollection.use_mpu_process_groups()
