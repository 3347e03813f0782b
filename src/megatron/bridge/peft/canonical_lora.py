# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA of the layers as Hugging Face has them: query, key, value, gate and up have an adapter each, as peft's."""

from dataclasses import dataclass, field

import torch

from megatron.bridge.peft.base import Model
from megatron.bridge.peft.fused_adapter import PARTS, FusedAdapter, part_names
from megatron.bridge.peft.linear_layout import CoreLinear, linear_layout
from megatron.bridge.peft.lora import LoRA

TARGET_MODULES = ("linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2")
"""The linear layers of attention and of a gated MLP, as Hugging Face has them."""


@dataclass
class CanonicalLoRA(LoRA):
    """LoRA with an A and a B of its own for each of query, key, value, gate and up, which are parts of fused layers."""

    target_modules: list[str] = field(default_factory=lambda: list(TARGET_MODULES))
    """As of `LoRA`, with "linear_q", "linear_k" and "linear_v" in place of "linear_qkv", and "linear_fc1_gate" and
    "linear_fc1_up" in place of "linear_fc1"; also as the last name of patterns."""

    def check(self) -> None:
        """See `PEFT.check`."""
        super().check()
        for option in ("target_modules", "exclude_modules"):
            for pattern in getattr(self, option):
                parts = part_names(pattern.rpartition(".")[2])
                if parts:
                    raise ValueError(
                        f"peft.{option} names {pattern!r}, a fused layer that CanonicalLoRA adapts in parts: expected "
                        f"{', '.join(parts.values())}; or take LoRA"
                    )

    def __call__(self, model: Model, training: bool = True) -> Model:
        """See `LoRA.__call__`. `module_names` then has the parts of fused layers in place of these."""
        super().__call__(model, training)
        split = (name.rpartition(".") for name in self.module_names)
        self.module_names = frozenset(
            f"{place}{dot}{part}" for place, dot, name in split for part in self.names_of(name)
        )
        return model

    def names_of(self, name: str) -> tuple[str, ...]:
        """See `LoRA.names_of`: the parts of a fused layer."""
        return tuple(part_names(name).values()) or (name,)

    def adapter_at(self, linear: CoreLinear, name: str) -> torch.nn.Module | None:
        """See `LoRA.adapter_at`."""
        place, dot, last = name.rpartition(".")
        if last not in PARTS:
            return super().adapter_at(linear, name)
        targets = {part: self.target_of(f"{place}{dot}{part_name}") for part, part_name in part_names(last).items()}
        wanted = {part: target for part, target in targets.items() if target is not None}
        if not wanted:
            return None
        self._matched.update(wanted.values())
        layout = linear_layout(linear, name)
        return FusedAdapter(linear, layout, self.options_for(linear, name), name, parts=wanted)
