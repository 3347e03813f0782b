# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adapters beside a tensor of all experts of a layer, as the peft library has them (`lora.ParamWrapper`).

All experts of a layer are in one A [E * R, I], expert after expert, and one B [P * O, R * E], in which the expert
changes first. The rows of B have the order of the tensor's outputs. peft wraps the module that has the tensors once
for each of them, the first one first: of two, `experts.base_layer.lora_A` is beside the first, `experts.lora_A` beside
the second.

The parts of an expert in one tensor, gate and up, share an A there. LoRA trains them so. With an A each, as
CanonicalLoRA has it, the two are put on top of each other, and each part's B has zeros beside the other's: P times the
rank, at the same scale.

Shapes: E experts, I input features, O output features of a part, P parts, R rank.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron.bridge.models.conversion.expert_stacks import ExpertStack

_PREFIX = "base_model.model."
_LAYER = re.compile(r"\.layers\.(\d+)\.(?:.*\.)?experts\.\d+\.")


@dataclass(frozen=True)
class StackedAdapters:
    """Adapters of experts as peft has them."""

    tensors: dict[str, torch.Tensor]
    """By their names in a file."""
    parameters: list[str]
    """The tensors beside which they are, for `target_parameters`."""
    ranks: dict[str, int]
    """The ranks that aren't that of all adapters, by the end of the tensor's name."""


def stack_adapters(
    tensors: Mapping[str, torch.Tensor],
    stacks: Sequence[ExpertStack],
    *,
    given: Collection[str],
    rank: int,
    num_layers: int,
    num_experts: int,
) -> StackedAdapters:
    """Put the adapters of each layer's experts together.

    Args:
        tensors: Of one rank, by the names of single experts; in a layer that has some, those of all its matrices.
        stacks: What the family's files may hold, in the order in which its module has the parameters.
        given: The names of those that were trained; the others are zeros.
        rank: R.
        num_layers: The model's layers, all of which have experts.
        num_experts: E.
    """
    layers = sorted({int(found[1]) for name in tensors if (found := _LAYER.search(name))})
    matrices = [stack for stack in stacks if all(part.endswith(".weight") for part in stack.parts)]
    stacked, parameters, ranks = {}, [], {}
    for depth, stack in enumerate(reversed(matrices)):
        experts = {
            layer: [_Expert.of(stack, layer, expert, tensors, given) for expert in range(num_experts)]
            for layer in layers
        }
        shares_a = all(expert.shares_a for of_layer in experts.values() for expert in of_layer)
        end = stack.name.partition("{layer}.")[2]
        if not shares_a:
            ranks[end] = len(stack.parts) * rank
        for layer, of_layer in experts.items():
            name = stack.name.replace("{layer}", str(layer))
            module = f"{_PREFIX}{name.rpartition('.')[0]}.{'base_layer.' * depth}"
            all_a, all_b = zip(*(expert.in_one(shares_a=shares_a) for expert in of_layer), strict=True)
            stacked[f"{module}lora_A.weight"] = torch.cat(all_a)
            stacked[f"{module}lora_B.weight"] = torch.stack(all_b, dim=-1).flatten(1)
            parameters.append(name)
        if len(layers) == num_layers:
            parameters[-num_layers:] = [end]
    return StackedAdapters(stacked, sorted(parameters), ranks)


@dataclass(frozen=True)
class _Expert:
    """The adapters of one expert's parts that are in one tensor."""

    all_a: list[torch.Tensor]
    """A of each part, [R, I]."""
    all_b: list[torch.Tensor]
    """B of each part, [O, R]."""
    trained: list[torch.Tensor]
    """A of the parts that were trained."""
    part_after_part: bool
    """As `ExpertStack` has it."""

    @classmethod
    def of(
        cls,
        stack: ExpertStack,
        layer: int,
        expert: int,
        tensors: Mapping[str, torch.Tensor],
        given: Collection[str],
    ) -> "_Expert":
        """Those of an expert."""
        parts = (part.replace("{layer}", str(layer)).replace("{expert}", str(expert)) for part in stack.parts)
        modules = [f"{_PREFIX}{part.removesuffix('.weight')}" for part in parts]
        names_a = [f"{module}.lora_A.weight" for module in modules]
        return cls(
            [tensors[name] for name in names_a],
            [tensors[f"{module}.lora_B.weight"] for module in modules],
            [tensors[name] for name in names_a if name in given],
            stack.part_after_part,
        )

    @property
    def shares_a(self) -> bool:
        """Whether one A is enough: the trained parts have the same."""
        return all(torch.equal(one, self.trained[0]) for one in self.trained)

    def in_one(self, *, shares_a: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, I] and B [P * O, R] of all parts together; with an A for each part P * R in place of R."""
        if shares_a:
            return (self.trained or self.all_a)[0], self._rows(self.all_b)
        rank, parts = len(self.all_a[0]), len(self.all_a)
        beside = [F.pad(b, (part * rank, (parts - 1 - part) * rank)) for part, b in enumerate(self.all_b)]
        return torch.cat(self.all_a), self._rows(beside)

    def _rows(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The parts' rows in the order of the tensor's outputs."""
        return torch.cat(parts) if self.part_after_part else torch.stack(parts, dim=1).flatten(0, 1)
