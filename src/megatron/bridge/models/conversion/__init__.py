# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face weights to Megatron weights and back, one tensor at a time, bit-exact."""

from typing import Any

__all__ = ["weights_verification_table"]


def __getattr__(name: str) -> Any:
    if name == "weights_verification_table":
        from megatron.bridge.models.conversion.utils import weights_verification_table

        return weights_verification_table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
