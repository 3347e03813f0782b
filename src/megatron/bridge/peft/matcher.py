# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which modules get an adapter, by name."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Core's linear layers of attention and MLP."""

_LATENT_QUERIES, _LATENT_KEYS = ("linear_q_proj", "linear_q_up_proj"), ("linear_kv_up_proj",)
_OF_LATENT_ATTENTION = {
    "linear_qkv": (*_LATENT_QUERIES, *_LATENT_KEYS),
    "linear_q": _LATENT_QUERIES,
    "linear_k": _LATENT_KEYS,
    "linear_v": _LATENT_KEYS,
}
"""The layers that stand for a last name in latent attention, which has none of these."""
_OF_DELTA_NET = {"linear_qkv": ("in_proj",), "linear_proj": ("out_proj",)}
"""The layers of Gated DeltaNet that the default targets mean, too: it stands in attention's place in some layers."""

_ONE_EXPERT = re.compile(r"\.local_experts\.\d+(?=\.)")


@dataclass
class ModuleMatcher:
    """Names of modules, or patterns of their whole names."""

    target_modules: list[str] = field(default_factory=lambda: list(TARGET_MODULES))
    """Modules to adapt: a last name such as "linear_qkv", or a pattern of the whole name in which * stands for any
    text, such as "*.layers.0.*.linear_qkv"; layers count from 0 over all pipeline stages, experts
    ("*.local_experts.3.linear_fc1", or all of them: "*.experts.linear_fc1") over all expert-parallel ranks. In latent
    attention "linear_qkv" means the layers that give queries, keys and values: "linear_q_proj" or "linear_q_up_proj",
    and "linear_kv_up_proj". The default targets mean "in_proj" and "out_proj" of Gated DeltaNet, too."""
    exclude_modules: list[str] = field(default_factory=list)
    """Modules to leave alone though they match a target, written likewise."""

    def target_of(self, name: str) -> str | None:
        """The first target that a module's whole name matches, or None."""
        return next(iter(self.targets_of(name)), None)

    def targets_of(self, name: str) -> list[str]:
        """All targets that a module's whole name matches."""
        if any(_matches(name, pattern) for pattern in self.exclude_modules):
            return []
        is_default = set(self.target_modules) == set(TARGET_MODULES)
        also = _OF_DELTA_NET if is_default else {}
        last = name.rpartition(".")[2]
        return [target for target in self.target_modules if _matches(name, target) or last in also.get(target, ())]


def _matches(name: str, pattern: str) -> bool:
    place, dot, last = pattern.rpartition(".")
    patterns = [pattern, *(f"{place}{dot}{other}" for other in _OF_LATENT_ATTENTION.get(last, ()))]
    # An expert by its number, and by the name of Transformer Engine's layer of all experts.
    names = (name, _ONE_EXPERT.sub("", name), name.rpartition(".")[2])
    return any(fnmatchcase(names[0], one) or fnmatchcase(names[1], one) or names[2] == one for one in patterns)
