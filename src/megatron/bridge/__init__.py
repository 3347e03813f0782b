# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Megatron Bridge: finetune Hugging Face models in parallel with Megatron-Core.

Importing this package loads nothing heavy: `AutoBridge` is fetched on first use.
"""

from typing import Any

from megatron.bridge.utils.core_warnings import silence_import_warnings
from megatron.bridge.utils.moved_modules import import_by_old_names

__version__ = "0.1.0"
__all__ = ["AutoBridge", "__version__"]

silence_import_warnings()
import_by_old_names()


def __getattr__(name: str) -> Any:
    if name == "AutoBridge":
        from megatron.bridge.models.conversion.auto_bridge import AutoBridge

        return AutoBridge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
