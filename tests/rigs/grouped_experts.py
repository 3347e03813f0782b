# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Core's `TEGroupedMLP` on grouped linear layers that need no Transformer Engine.

The layers have the names, the attributes and the stored form of Core's wrappers of Transformer Engine's. What calls
them, moves tokens and stores experts is Core's own.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts as core_experts
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron.bridge.models.layer_specs import local_layer_spec


class _GroupedLinear(torch.nn.Module):
    """One matrix [out, in] an expert, `weight0`, …, and a bias each."""

    split_axis: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.num_gemms, self.use_bias = config, num_gemms, bias
        self.te_return_bias = skip_bias_add and bias
        self._pg_collection, self._tp_group = pg_collection, pg_collection.expt_tp
        shape = [output_size, input_size]
        shape[self.split_axis] //= self._tp_group.size()
        generator = torch.Generator().manual_seed(pg_collection.ep.rank())
        for number in range(num_gemms):
            weight = torch.randn(shape, generator=generator).to(config.params_dtype) * config.init_method_std
            parts = {"weight": weight, "bias": torch.randn(shape[0], generator=generator).to(config.params_dtype)}
            for kind in ("weight", "bias") if bias else ("weight",):
                parameter: Any = torch.nn.Parameter(parts[kind])
                parameter.allreduce = config.expert_model_parallel_size == 1
                parameter.tensor_model_parallel = True
                parameter.partition_dim, parameter.partition_stride = self.split_axis, 1
                self.register_parameter(f"{kind}{number}", parameter)

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, Any]:
        """As Core's: tokens expert after expert, [tokens, in]."""
        biases = [getattr(self, f"bias{number}") if self.use_bias else None for number in range(self.num_gemms)]
        added = [None] * self.num_gemms if self.te_return_bias else biases
        outputs = [
            F.linear(tokens, getattr(self, f"weight{number}"), added[number])
            for number, tokens in enumerate(x.split(m_splits))
        ]
        return torch.cat(outputs), biases if self.te_return_bias else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Each expert's matrix as that of a module of its own; `TEGroupedMLP` adds what is before `prefix`."""
        groups, state = self._pg_collection, {}
        total, first = groups.ep.size() * self.num_gemms, groups.ep.rank() * self.num_gemms
        for number in range(self.num_gemms):
            kinds = ("weight", "bias") if self.use_bias else ("weight",)
            own = {f"{prefix}{kind}{number}": getattr(self, f"{kind}{number}") for kind in kinds}
            cut = {f"{prefix}weight{number}": self.split_axis, f"{prefix}bias{number}": 0}
            offsets = (*sharded_offsets, (len(sharded_offsets), first + number, total))
            found = make_sharded_tensors_for_checkpoint(
                own, "", cut, offsets, tp_group=self._tp_group, dp_cp_group=metadata["dp_cp_group"]
            )
            for kind in kinds:
                one = found[f"{prefix}{kind}{number}"]
                one.replica_id = (*one.replica_id[:2], groups.expt_dp.rank())
                replace_prefix_for_sharding({"": one}, f"{prefix}{kind}{number}", f"{prefix}{kind}")
            state.update(found)
        return state


class TEColumnParallelGroupedLinear(_GroupedLinear):
    """Outputs cut over ranks."""

    split_axis = 0


class TERowParallelGroupedLinear(_GroupedLinear):
    """Inputs cut over ranks."""

    split_axis = 1


def grouped_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Core's local layers with grouped experts."""
    block = local_layer_spec(config, vp_stage)
    return replace(block, layer_specs=[_with_grouped_experts(layer) for layer in block.layer_specs])


def _with_grouped_experts(layer: Any) -> Any:
    kind = getattr(core_experts, "GroupedMLPSubmodules", MLPSubmodules)
    linears = kind(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    mlp = layer.submodules.mlp
    if isinstance(mlp, ModuleSpec) and mlp.module is MoELayer:
        experts = replace(mlp.submodules, experts=ModuleSpec(TEGroupedMLP, submodules=linears))
        mlp = replace(mlp, submodules=experts)
    elif isinstance(mlp, partial) and mlp.func is MoELayer:
        experts = replace(mlp.keywords["submodules"], experts=partial(TEGroupedMLP, submodules=linears))
        mlp = partial(MoELayer, **{**mlp.keywords, "submodules": experts})
    return replace(layer, submodules=replace(layer.submodules, mlp=mlp))
