# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which modules get an adapter, by name."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Core's linear layers of attention and MLP."""


@dataclass
class ModuleMatcher:
    """Names of modules, or patterns of their whole names."""

    target_modules: list[str] = field(default_factory=lambda: list(TARGET_MODULES))
    """Modules to adapt: a last name such as "linear_qkv", or a pattern of the whole name in which * stands for any
    text, such as "*.layers.0.*.linear_qkv"; layers count from 0 over all pipeline stages, experts
    ("*.local_experts.3.linear_fc1") over all expert-parallel ranks."""
    exclude_modules: list[str] = field(default_factory=list)
    """Modules to leave alone though they match a target, written likewise."""

    def target_of(self, name: str) -> str | None:
        """The target that a module's whole name matches, or None."""
        if any(_matches(name, pattern) for pattern in self.exclude_modules):
            return None
        return next((pattern for pattern in self.target_modules if _matches(name, pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern
