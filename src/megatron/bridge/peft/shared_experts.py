# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""One adapter beside a matrix of all experts of a layer.

The module of the experts has it, as `experts.adapter.linear_fc1`, and each expert's layer uses it. Every
expert-parallel rank holds the whole adapter and has a part of its gradient, that of its own experts. So it is a weight
like those of attention, not like those of experts: Core sums its gradients over all data-parallel ranks, which include
the expert-parallel ones, and a checkpoint stores it once.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding

from megatron.bridge.peft.adapted_linear import Adapted, AdaptedGroupedLinear, AdaptedLinear, AdaptedWeight, adapt
from megatron.bridge.peft.grouped_experts import GroupedExpert
from megatron.bridge.peft.linear_layout import CoreLinear, is_grouped, is_linear

Experts = Any
"""Core's module of a layer's experts: one of `SequentialMLP` or `TEGroupedMLP`."""


class AdaptedExperts(Adapted):
    """Mark of Core's modules of all experts of a layer that have adapters: a `ModuleDict` by the matrix's name."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Core's, and the adapters': the same tensors for experts of every form."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, one in self.adapter.items():
            adapter: Any = one
            own = f"{prefix}adapter.{name}."
            of_adapter = adapter.sharded_state_dict(own, sharded_offsets, metadata)
            if not adapter.layout.is_cut:  # whole on each tensor-parallel rank, of which Core's groups here know one
                tp_rank = parallel_state.get_tensor_model_parallel_rank()
                for tensor in of_adapter.values():
                    tensor.replica_id = (0, tp_rank, tensor.replica_id[2])
            replace_prefix_for_sharding(of_adapter, own, f"{prefix}experts.{name}.adapter.")
            state.update(of_adapter)
        return state


class _SharingLinear(AdaptedLinear):
    """An expert's layer that uses its container's adapter, which is no submodule of it."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        return super(AdaptedLinear, self).sharded_state_dict(prefix, sharded_offsets, metadata)


class _SharingGroupedLinear(AdaptedGroupedLinear):
    """The same for Transformer Engine's layer of all experts, whose tokens all go through the one adapter."""

    def forward(self, x: torch.Tensor, m_splits: Any) -> tuple[torch.Tensor, Any]:
        output, bias = super(AdaptedLinear, self).forward(x, m_splits)
        return (self.adapter(self, x, output) if self.adapter_enabled else output), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        return super(AdaptedLinear, self).sharded_state_dict(prefix, sharded_offsets, metadata)

    def adapted_weights(self) -> dict[str, AdaptedWeight]:
        experts = (GroupedExpert(self, number) for number in range(self.num_gemms))
        return {f"weight{expert.number}": AdaptedWeight(expert, self.adapter) for expert in experts}


def is_experts(module: torch.nn.Module, name: str) -> bool:
    """Whether a module holds the experts of a layer.

    Args:
        module: Any module of a model.
        name: Its last name.
    """
    return name == "experts" and hasattr(module, "num_local_experts")


def linears_of(experts: Experts) -> dict[str, list[CoreLinear]]:
    """This rank's linear layers of the experts, by the names that each expert has for its own.

    Args:
        experts: Of a layer.
    """
    found: dict[str, list[CoreLinear]] = {}
    for name, module in experts.named_modules():
        if is_linear(module):
            found.setdefault(name.rpartition(".")[2], []).append(module)
    return found


def a_matrix_of(linear: CoreLinear) -> CoreLinear:
    """The layer of one expert, whose matrix has the size of every other's."""
    return GroupedExpert(linear, 0) if is_grouped(linear) else linear


def share_adapters(experts: Experts, adapters: dict[str, torch.nn.Module]) -> None:
    """Put adapters beside all experts of a layer, in place.

    Args:
        experts: Of the layer.
        adapters: By the names that `linears_of` gives.
    """
    for name, linears in linears_of(experts).items():
        if name in adapters:
            _mark_as_whole(adapters[name])
            for linear in linears:
                adapt(linear, _SharingGroupedLinear if is_grouped(linear) else _SharingLinear)
                linear.__dict__["adapter"] = adapters[name]  # past torch, for which it is the container's alone
    adapt(experts, AdaptedExperts)
    experts.adapter = torch.nn.ModuleDict(adapters)


def _mark_as_whole(adapter: Any) -> None:
    """Let Core sum the gradients as those of a weight that all ranks of a stage hold, but for a tensor-parallel cut.

    Where tensor-parallel ranks have an expert each, or other tokens of the same, each has a part of the gradient. The
    mark for that is sequence parallelism's, which Core requires there.
    """
    for parameter in adapter.parameters():
        parameter.allreduce = True
        if not adapter.layout.is_cut:
            parameter.tensor_model_parallel = False  # counted once in the norm of gradients
            parameter.sequence_parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
