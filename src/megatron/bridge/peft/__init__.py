# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 3: adapters, which are small trainable layers beside the frozen layers of a pretrained model."""

from importlib import import_module
from typing import Any

_DOORS = {
    "CanonicalLoRA": "megatron.bridge.peft.canonical_lora",
    "PEFT": "megatron.bridge.peft.base",
    "DoRA": "megatron.bridge.peft.dora",
    "LoRA": "megatron.bridge.peft.lora",
    "LoRAMerge": "megatron.bridge.peft.lora",
}
__all__ = list(_DOORS)


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_DOORS[name]), name)
