# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of `CommOverlapConfig`; `megatron.bridge.training.config.comm_overlap` defines it."""

from megatron.bridge.training.config.comm_overlap import (
    CommOverlapConfig,
)

__all__ = [
    "CommOverlapConfig",
]
