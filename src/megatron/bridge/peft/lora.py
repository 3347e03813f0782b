# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""LoRA: a low-rank update beside a frozen matrix (Hu et al. 2021, arXiv 2106.09685)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron.bridge.peft.adapted_linear import Adapted, add_adapter, merge_adapter
from megatron.bridge.peft.base import PEFT, Model
from megatron.bridge.peft.grouped_experts import GroupedAdapter, experts_of
from megatron.bridge.peft.linear_layout import CoreLinear, is_grouped, is_linear, linear_layout
from megatron.bridge.peft.lora_layers import INITIALISERS, LowRankAdapter
from megatron.bridge.peft.lora_plus import get_lora_plus_config_overrides
from megatron.bridge.peft.matcher import ModuleMatcher
from megatron.bridge.peft.shared_experts import a_matrix_of, is_experts, linears_of, share_adapters
from megatron.bridge.utils.distributed import all_gathered, raise_on_all_ranks

__all__ = ["LoRA", "LoRAMerge", "get_lora_plus_config_overrides"]

_INITIALISERS = f"one of {', '.join(INITIALISERS)}"
_NEVER_GATHERED = "inputs of adapters are never gathered, and only dim channels travel between ranks"


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
    normalize_moe_lora: bool = False
    """Whether adapters of experts have `dim` / `moe_router_topk` as their rank, so that a token's experts have `dim`
    together. The scale, `alpha` by the rank, grows likewise."""
    lora_dtype: torch.dtype | None = None
    """Refused if it isn't the adapted layers' dtype, which adapters have. None: that one."""
    share_expert_adapters: bool = False
    """Whether all experts of a layer share one adapter for each of their matrices. Targets then name experts as a
    whole: "linear_fc1" or "*.layers.0.*.experts.linear_fc1". False: each expert has adapters of its own."""
    experts_shared_outer_loras: bool = False
    """Refused beside experts: they share both matrices of an adapter or none."""
    a2a_experimental: bool = False
    """Refused: only `dim` channels travel between ranks."""
    sequence_parallel_input_regather: bool = False
    """Refused: an adapter works on its rank's part of the sequence, so that no whole input is gathered or kept."""

    def check(self) -> None:
        """See `PEFT.check`."""
        for option, value, expected, is_right in (
            ("dim", self.dim, "1 or more", self.dim >= 1),
            ("dropout", self.dropout, "0 or more, below 1", 0 <= self.dropout < 1),
            ("dropout_position", self.dropout_position, "pre or post", self.dropout_position in ("pre", "post")),
            ("lora_A_init_method", self.lora_A_init_method, _INITIALISERS, self.lora_A_init_method in INITIALISERS),
            ("lora_B_init_method", self.lora_B_init_method, _INITIALISERS, self.lora_B_init_method in INITIALISERS),
            ("target_modules", self.target_modules, "at least one name", bool(self.target_modules)),
            ("a2a_experimental", self.a2a_experimental, f"false; {_NEVER_GATHERED}", not self.a2a_experimental),
            (
                "sequence_parallel_input_regather",
                self.sequence_parallel_input_regather,
                f"false; {_NEVER_GATHERED}",
                not self.sequence_parallel_input_regather,
            ),
        ):
            if not is_right:
                raise ValueError(f"peft.{option}={value!r}: expected {expected}")
        for pattern in (*self.target_modules, *self.exclude_modules) if self.share_expert_adapters else ():
            if "local_experts" in pattern:
                raise ValueError(
                    f"peft.share_expert_adapters=true, and {pattern!r} names single experts: expected all of a layer, "
                    'as in "*.layers.0.*.experts.linear_fc1"'
                )

    def __call__(self, model: Model, training: bool = True) -> Model:
        """See `PEFT.__call__`. Collective where there are several processes.

        Raises:
            ValueError: A target matches no module on any rank.
        """
        self._matched: set[str] = set()
        self._experts: dict[str, frozenset[str]] = {}
        chunks = model if isinstance(model, list) else [model]
        modules = [item for chunk in chunks for item in chunk.named_modules()]
        linears = {whole.rpartition(".")[2] for whole, module in modules if is_linear(module)}
        with raise_on_all_ranks("adding adapters"):
            super().__call__(model, training)
        # Experts have the names that they have as modules of their own, whatever their form.
        self.module_names = self.module_names.difference(self._experts).union(*self._experts.values())
        matched = all_gathered(self._matched)
        unmatched = [target for target in self.target_modules if not any(target in ranks for ranks in matched)]
        if unmatched:
            names = {part for name in set().union(*all_gathered(linears)) for part in self.names_of(name)}
            raise ValueError(
                f"peft.target_modules names {unmatched[0]!r}, which matches no module of the model: expected the "
                'name of a linear layer, or a pattern such as "*.layers.0.*.linear_proj"; this model has '
                f"{', '.join(sorted(names))}"
            )
        return model

    def names_of(self, name: str) -> tuple[str, ...]:
        """The last names by which targets name a linear layer of this last name."""
        return (name,)

    def transform(self, module: torch.nn.Module, name: str = "", prefix: str = "") -> torch.nn.Module:
        """See `PEFT.transform`.

        Raises:
            ValueError: A target is no linear layer that can be adapted.
        """
        whole_name = f"{prefix}.{name}" if prefix else name
        adapter: torch.nn.Module | None
        if self.share_expert_adapters and is_experts(module, name):
            self._share_adapters(module, whole_name)
            return module
        if self.share_expert_adapters and "experts" in prefix.split("."):
            return module  # their container has been seen before them
        if is_grouped(module):
            experts = experts_of(module, whole_name)
            self._experts[whole_name] = frozenset(experts)
            found = {str(expert.number): self.adapter_at(expert, at) for at, expert in experts.items()}
            adapter = GroupedAdapter({number: one for number, one in found.items() if one is not None}) or None
        else:
            adapter = self.adapter_at(module, whole_name)
        if adapter is not None:
            add_adapter(module, adapter)
        return module

    def _share_adapters(self, experts: torch.nn.Module, name: str) -> None:
        """Put an adapter beside each matrix of all experts of a layer, if a target matches it."""
        found = {
            own: self.adapter_at(a_matrix_of(same[0]), f"{name}.{own}") for own, same in linears_of(experts).items()
        }
        adapters = {own: adapter for own, adapter in found.items() if adapter is not None}
        if adapters:
            share_adapters(experts, adapters)

    def adapter_at(self, linear: CoreLinear, name: str) -> torch.nn.Module | None:
        """A new adapter for a module, if a target matches it.

        Args:
            linear: The module, or an expert of a grouped layer.
            name: Its whole name.

        Raises:
            ValueError: It is no linear layer that can be adapted.
        """
        targets = self.targets_of(name)
        if not targets:
            return None
        self._matched.update(targets)
        return self.adapter_for(linear, name)

    def adapter_for(self, linear: CoreLinear, name: str) -> torch.nn.Module:
        """A new adapter for a linear layer.

        Args:
            linear: Core's or Transformer Engine's, or an expert of a grouped one.
            name: Its whole name.
        """
        layout = linear_layout(linear, name)  # before its weight is looked at: it may have none
        return LowRankAdapter(linear.weight, layout, self.options_for(linear, name), name)

    def options_for(self, linear: CoreLinear, name: str) -> "LoRA":
        """The options of one layer's adapter: an expert's may have another rank.

        Args:
            linear: Core's or Transformer Engine's.
            name: Its whole name.

        Raises:
            ValueError: The layer can't have what the options say.
        """
        if self.lora_dtype not in (None, linear.weight.dtype):
            raise ValueError(
                f"peft.lora_dtype={self.lora_dtype}, and {name} is in {linear.weight.dtype}: adapters have the dtype "
                "of their layer; unset it"
            )
        if "experts" not in name.split("."):
            return self
        if self.experts_shared_outer_loras:
            raise ValueError(
                f"peft.experts_shared_outer_loras=true, and {name} is an expert's: expected false; with "
                "peft.share_expert_adapters=true the experts of a layer share both matrices of an adapter"
            )
        if not self.normalize_moe_lora:
            return self
        topk = linear.config.moe_router_topk
        if self.dim % topk:
            raise ValueError(
                f"peft.normalize_moe_lora=true with peft.dim={self.dim} and model.moe_router_topk={topk}: expected a "
                "multiple of it; change peft.dim"
            )
        return replace(self, dim=self.dim // topk)


@dataclass
class LoRAMerge(PEFT):
    """Called with a model that has adapters, of any kind, it adds them to the weights and removes them, in place.

    Call it on all ranks. The merged model has no parameter that is trained.
    """

    def transform(self, module: torch.nn.Module, name: str = "", prefix: str = "") -> torch.nn.Module:
        """Merge the adapter of one layer; see `PEFT.transform`."""
        if isinstance(module, Adapted):
            merge_adapter(module)
        return module
