# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 5: functions that return a ready configuration. A recipe is imported when it is asked for."""

import importlib
from typing import Any

_RECIPES = {"smollm2_135m_sft_config": "smollm2", "smollm2_135m_peft_config": "smollm2"}

__all__ = [*_RECIPES]


def __getattr__(name: str) -> Any:
    if name in _RECIPES:
        return getattr(importlib.import_module(f"{__name__}.{_RECIPES[name]}"), name)
    raise AttributeError(f"{__name__} has no recipe {name!r}; there are: {', '.join(_RECIPES)}")
