# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA: a low-rank update beside a frozen matrix (Hu et al. 2021, arXiv 2106.09685)."""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron.bridge.peft.adapted_linear import add_adapter
from megatron.bridge.peft.base import PEFT, Model
from megatron.bridge.peft.linear_layout import CoreLinear, linear_layout
from megatron.bridge.peft.lora_layers import INITIALISERS, LowRankAdapter
from megatron.bridge.peft.matcher import ModuleMatcher
from megatron.bridge.utils.distributed import all_gathered, raise_on_all_ranks

_INITIALISERS = f"one of {', '.join(INITIALISERS)}"


@dataclass
class LoRA(PEFT, ModuleMatcher):
    """y = W x + alpha / dim * B A x, with A [dim, in] and B [out, dim] trained and W frozen."""

    dim: int = 32
    """Rank of the update."""
    alpha: float = 32
    """The update is scaled by alpha / dim."""
    dropout: float = 0.0
    """Part of the adapter's values that is dropped in training."""
    dropout_position: Literal["pre", "post"] = "pre"
    """Whether they are dropped from the adapter's input or from its output."""
    lora_A_init_method: str = "xavier"
    """Of A: "xavier", "uniform" (Kaiming's, as peft does) or "normal"."""
    lora_B_init_method: str = "zero"
    """Of B: "zero", so that the adapted model starts as the model, or one of A's."""

    def check(self) -> None:
        """See `PEFT.check`."""
        for option, value, expected, is_right in (
            ("dim", self.dim, "1 or more", self.dim >= 1),
            ("dropout", self.dropout, "0 or more, below 1", 0 <= self.dropout < 1),
            ("dropout_position", self.dropout_position, "pre or post", self.dropout_position in ("pre", "post")),
            ("lora_A_init_method", self.lora_A_init_method, _INITIALISERS, self.lora_A_init_method in INITIALISERS),
            ("lora_B_init_method", self.lora_B_init_method, _INITIALISERS, self.lora_B_init_method in INITIALISERS),
            ("target_modules", self.target_modules, "at least one name", bool(self.target_modules)),
        ):
            if not is_right:
                raise ValueError(f"peft.{option}={value!r}: expected {expected}")

    def __call__(self, model: Model, training: bool = True) -> Model:
        """See `PEFT.__call__`. Collective where there are several processes.

        Raises:
            ValueError: A target matches no module on any rank.
        """
        self._matched: set[str] = set()
        with raise_on_all_ranks("adding adapters"):
            super().__call__(model, training)
        matched = all_gathered(self._matched)
        unmatched = [target for target in self.target_modules if not any(target in ranks for ranks in matched)]
        if unmatched:
            example = type(self)().target_modules[0]
            raise ValueError(
                f"peft.target_modules names {unmatched[0]!r}, which matches no module of the model: expected the "
                f'name of a linear layer such as "{example}", or a pattern such as "*.layers.0.*.{example}"'
            )
        return model

    def transform(self, module: torch.nn.Module, name: str = "", prefix: str = "") -> torch.nn.Module:
        """See `PEFT.transform`.

        Raises:
            ValueError: A target is no linear layer that can be adapted.
        """
        whole_name = f"{prefix}.{name}" if prefix else name
        target = self.target_of(whole_name)
        if target is not None:
            add_adapter(module, self.adapter_for(module, whole_name))
            self._matched.add(target)
        return module

    def adapter_for(self, linear: CoreLinear, name: str) -> torch.nn.Module:
        """A new adapter for a linear layer.

        Args:
            linear: Core's or Transformer Engine's.
            name: Its whole name.
        """
        layout = linear_layout(linear, name)  # before its weight is looked at: it may have none
        return LowRankAdapter(linear.weight, layout, self, name)
