# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Transformer Engine's layer of all experts, `weight0`, `weight1`, …, seen as a linear layer for each of them.

Everything that an adapter does beside one layer it does beside one expert's part. Names, initial values and stored
tensors are those of experts that have a module each, so that adapters of one form load in the other.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding


class GroupedExpert:
    """One expert of a grouped layer, with the attributes of a linear layer that an adapter reads.

    Args:
        grouped: The layer of all experts.
        number: The expert's among those of this rank.
    """

    def __init__(self, grouped: Any, number: int) -> None:
        self.grouped, self.number = grouped, number
        self.config = grouped.config

    @property
    def weight(self) -> torch.Tensor:
        """The expert's matrix [out, in], this rank's part."""
        return getattr(self.grouped, f"weight{self.number}")  # there is none if they are one tensor

    @property
    def bias(self) -> torch.Tensor | None:
        """Its bias [out]."""
        return getattr(self.grouped, f"bias{self.number}") if self.grouped.use_bias else None


def experts_of(grouped: Any, name: str) -> dict[str, GroupedExpert]:
    """This rank's experts, each by the whole name of the layer that it had if it were a module of its own.

    Args:
        grouped: The layer of all experts.
        name: Its whole name.
    """
    place, _, last = name.rpartition(".")
    first = grouped._pg_collection.ep.rank() * grouped.num_gemms
    experts = (GroupedExpert(grouped, number) for number in range(grouped.num_gemms))
    return {f"{place}.local_experts.{first + one.number}.{last}": one for one in experts}


class GroupedAdapter(torch.nn.ModuleDict):
    """The adapters beside a grouped layer, by the experts' numbers among those of this rank."""

    def forward(self, grouped: Any, x: torch.Tensor, output: torch.Tensor, m_splits: Any) -> torch.Tensor:
        """Let each adapter see the tokens of its expert.

        Args:
            grouped: The layer.
            x: Its input [tokens, in], expert after expert.
            output: Its output [tokens, out].
            m_splits: How many tokens each expert has.
        """
        sizes = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits)
        inputs, outputs = x.split(sizes), list(output.split(sizes))
        for key, adapter in self.items():
            number = int(key)
            outputs[number] = adapter(GroupedExpert(grouped, number), inputs[number], outputs[number])
        return torch.cat(outputs)

    def sharded_state_dict_of(
        self, grouped: Any, prefix: str, sharded_offsets: tuple, metadata: dict[str, Any] | None
    ) -> ShardedStateDict:
        """As stored: each expert's parameters under the keys that they have where it is a module of its own.

        Args:
            grouped: The layer.
            prefix: As for `sharded_state_dict`, and so are `sharded_offsets` and `metadata`.
        """
        singleton = (metadata or {}).get("singleton_local_shards", False)
        groups = grouped._pg_collection
        num_experts = groups.ep.size() * grouped.num_gemms
        first = groups.ep.rank() * grouped.num_gemms
        state: ShardedStateDict = {}
        for key, one in self.items():
            adapter: Any = one
            expert = first + int(key)
            offsets = () if singleton else ((len(sharded_offsets), expert, num_experts),)
            own = f"{prefix}adapter.{key}."
            of_expert = adapter.sharded_state_dict(own, (*sharded_offsets, *offsets), metadata)
            for tensor in of_expert.values():
                tensor.replica_id = (*tensor.replica_id[:2], groups.expt_dp.rank())
            replace_prefix_for_sharding(of_expert, own, f"{f'{expert}.' if singleton else ''}{prefix}adapter.")
            state.update(of_expert)
        return state
