# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import paths of what scripts for Megatron Bridge build their own recipes from."""

from typing import Any

__all__ = ["apply_determinism_overrides"]


def __getattr__(name: str) -> Any:
    if name == "apply_determinism_overrides":
        from megatron.bridge.recipes.utils.determinism_utils import apply_determinism_overrides

        return apply_determinism_overrides
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
