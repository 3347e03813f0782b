# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public paths and old names: what scripts for Megatron Bridge, or for this package before modules moved, import.

Importing such a name gives the module itself. Configuration files may name classes by them too, since `targets.py`
imports what they name.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PUBLIC_PATHS = {
    f"megatron.bridge.{public}": f"megatron.bridge.{own}"
    for public, own in {
        "data.base": "data.config",
        "recipes.gemma": "recipes.gemma3",
        "recipes.gemma.gemma3": "recipes.gemma3",
        "recipes.llama.h100": "recipes.h100",
        "recipes.llama.llama3": "recipes.llama",
        "recipes.moonlight": "recipes.deepseek_v3",
        "recipes.qwen.h100": "recipes.h100",
        "recipes.qwen.qwen2": "recipes.qwen2",
        "recipes.qwen.qwen3": "recipes.qwen3",
        "recipes.qwen.qwen3_moe": "recipes.qwen3_moe",
        "recipes.qwen.qwen3_next": "recipes.qwen3_next",
        "training.deepep": "models.expert_dispatch",
        "training.flex_dispatcher_backend": "models.expert_dispatch",
        "training.model_load_save": "training.utils.model_load_save",
        "training.utils.theoretical_memory_utils": "planning.theoretical_memory",
        "training.utils.moe_token_drop": "models.expert_dispatch",
    }.items()
}
"""Modules that scripts for Megatron Bridge import, and ours that hold what they take from them."""

OLD_NAMES = {
    f"megatron.bridge.{old}": f"megatron.bridge.{new}"
    for old, new in {
        "checkpoint.layout": "checkpoint.iterations",
        "training.config_checkpoint": "training.config",
        "training.config_derived": "training.config.derived",
        "training.config_logging": "training.config",
        "training.config_optimizer": "training.config",
        "training.config_processes": "training.config",
        "training.config_sections": "training.config",
        "training.config_unsupported": "training.config.unsupported",
        "training.memory_estimate": "planning.memory",
        "training.metrics": "training.monitoring.metrics",
    }.items()
}
"""Modules of this package that were documented under another name."""

MOVED = {**PUBLIC_PATHS, **OLD_NAMES}


class _OtherNames(MetaPathFinder, Loader):
    """Finds the modules in `MOVED`, and imports what they are now."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's name, which the import machinery has just overwritten. The module has already run."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def import_by_old_names() -> None:
    """Make those names importable from now on. Idempotent."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _OtherNames)] + [_OtherNames()]
