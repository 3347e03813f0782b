# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adapters of experts in the form that the peft library stacks: all matrices of all experts of a layer, or none.

Where a family's files have the experts one by one, so are the adapters named: `...experts.3.gate_proj.lora_A.weight`.
transformers keeps the experts of a layer in two tensors; peft puts the adapters of a layer together beside these, and
has no place for a part of them. Where files have these two tensors themselves, `stacked_adapters.py` puts the adapters
together: for such families peft doesn't.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron.bridge.models.conversion.mapping import WeightMapping
from megatron.bridge.models.conversion.stacked_adapters import stack_adapters
from megatron.bridge.models.families import ModelFamily

_PREFIX = "base_model.model."
_EXPERT = re.compile(r"\.layers\.(\d+)\.(?:.*\.)?experts\.\d+\.")


@dataclass(frozen=True)
class PeftAdapters:
    """Adapters as the peft library has them."""

    tensors: dict[str, torch.Tensor]
    """By their names in a file."""
    modules: list[str]
    """The adapted modules, for `target_modules`."""
    parameters: list[str]
    """The adapted parameters, for `target_parameters`."""
    ranks: dict[str, int] = field(default_factory=dict)
    """The ranks that aren't that of all adapters, by the end of a parameter's name."""


def adapters_for_peft(
    tensors: Mapping[str, torch.Tensor], family: ModelFamily, config: TransformerConfig, *, rank: int
) -> PeftAdapters:
    """Adapters of every layer, an expert's by its own name, in the form that peft has a place for.

    Args:
        tensors: As for `complete_experts`, and so are `family`, `config` and `rank`.

    Raises:
        ValueError: peft has no place for an adapter.
    """
    completed = complete_experts(tensors, family, config, rank=rank)
    if not family.stacks_in_files:
        return PeftAdapters(completed, *targets(completed, family, config))
    stacked = stack_adapters(
        {name: tensor for name, tensor in completed.items() if _is_expert(name)},
        family.stacks_in_files,
        given=tensors,
        rank=rank,
        num_layers=config.num_layers,
        num_experts=config.num_moe_experts,
    )
    others = {name: tensor for name, tensor in completed.items() if not _is_expert(name)}
    modules, parameters = targets(others, family, config)
    return PeftAdapters({**others, **stacked.tensors}, modules, parameters + stacked.parameters, stacked.ranks)


def complete_experts(
    tensors: Mapping[str, torch.Tensor], family: ModelFamily, config: TransformerConfig, *, rank: int
) -> dict[str, torch.Tensor]:
    """The tensors, all of one rank, and zeros for the matrices without an adapter in layers where an expert has one.

    Args:
        tensors: Adapters by peft's names.
        family: Its table of mappings.
        config: The model's.
        rank: Of the adapters.

    Raises:
        ValueError: peft has no place for an adapter.
    """
    if config.num_moe_experts is None:
        return dict(tensors)
    rows = _rows_of_experts(family)
    _check_peft_has_a_place(tensors, {_leaf(name) for row in rows for name in row.hf_names})
    layers = {int(found[1]): name for name in tensors if (found := _EXPERT.search(name))}
    filled = {name: _of_rank(rank, name, tensor) if _is_expert(name) else tensor for name, tensor in tensors.items()}
    for layer, one in layers.items():
        for row in rows:
            hidden, width = config.hidden_size, config.moe_ffn_hidden_size
            inputs, outputs = (hidden, width) if "linear_fc1" in row.megatron_name else (width, hidden)
            for expert in range(config.num_moe_experts):
                for weight in row.at_layer(layer, expert).hf_names:
                    module = f"{_PREFIX}{weight.removesuffix('.weight')}"
                    for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                        name = f"{module}.lora_{side}.weight"
                        if name not in filled:
                            filled[name] = torch.zeros(shape, dtype=tensors[one].dtype)
    return filled


def targets(
    tensors: Mapping[str, torch.Tensor], family: ModelFamily, config: TransformerConfig
) -> tuple[list[str], list[str]]:
    """The adapted modules, and the parameters that are named one by one in their place, for `adapter_config.json`.

    In a model with experts, peft takes the name of a plain MLP's matrix, or a shared expert's, for that of an expert's.
    As a parameter it is adapted alike.
    """
    is_matrix = frozenset[str]()
    if config.num_moe_experts is not None:
        is_matrix = frozenset(_leaf(name) for row in _rows_of_experts(family) for name in row.hf_names)
    plain = {name for name in tensors if not _is_expert(name) and _leaf(name.split(".lora_")[0]) in is_matrix}
    parameters = {f"{name.removeprefix(_PREFIX).split('.lora_')[0]}.weight" for name in plain}
    others = {name: tensor for name, tensor in tensors.items() if name not in plain}
    return target_modules(others, config), sorted(parameters)


def target_modules(tensors: Mapping[str, torch.Tensor], config: TransformerConfig) -> list[str]:
    """The adapted modules: by their last names if each has an adapter wherever the model has it, else in full."""
    modules = sorted(name.removeprefix(_PREFIX).split(".lora_A")[0] for name in tensors if ".lora_A." in name)
    kinds = {_leaf(module): config.num_layers for module in modules}
    kinds |= {_leaf(name): config.num_layers * (config.num_moe_experts or 1) for name in modules if _is_expert(name)}
    return sorted(kinds) if len(modules) == sum(kinds.values()) else modules


def _of_rank(rank: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A or B of a lower rank with zeros up to `rank`, and B with the scale that the lower rank had: alpha by it."""
    is_a = ".lora_A." in name
    own = tensor.shape[0 if is_a else 1]
    if own == rank:
        return tensor
    padded = F.pad(tensor, (0, 0, 0, rank - own) if is_a else (0, rank - own))
    return padded if is_a else padded * (rank / own)


def _rows_of_experts(family: ModelFamily) -> list[WeightMapping]:
    return [row for row in family.mappings if row.is_expert and "local_experts" in row.megatron_name]


def _check_peft_has_a_place(tensors: Mapping[str, torch.Tensor], matrices: set[str]) -> None:
    for name in tensors:
        module = name.split(".lora_")[0]
        if _is_expert(module) and "lora_magnitude_vector" in name:
            raise ValueError(
                f"{module} is an expert's with DoRA, which peft has no place for: merge the adapters into the weights "
                "(python -m megatron.bridge.convert export), or train experts with LoRA"
            )
        if not _is_expert(module) and _leaf(module) in matrices and "lora_magnitude_vector" in name:
            raise ValueError(
                f"{module} is an MLP in a model with experts, with DoRA, which peft has no place for: merge the "
                "adapters into the weights (python -m megatron.bridge.convert export), or name it in "
                "peft.exclude_modules"
            )


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _leaf(name: str) -> str:
    """The last name of a module, or of the module that a weight is of."""
    return name.removesuffix(".weight").rpartition(".")[2]
