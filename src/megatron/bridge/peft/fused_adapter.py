# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Low-rank paths beside the parts of a fused layer: query, key and value, or gate and up, each by itself.

Core keeps query, key and value in one matrix, group by group, and gate and up in one, rank by rank. A path's own
matrices are those of the Hugging Face layer, cut over the ranks in its order.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megatron.bridge.peft.linear_layout import CoreLinear, LinearLayout
from megatron.bridge.peft.lora_layers import LoRAOptions, LowRankAdapter

PARTS: dict[str, tuple[str, ...]] = {"linear_qkv": ("q", "k", "v"), "linear_fc1": ("gate", "up")}
"""The parts of a fused layer, in Core's order."""


def part_names(fused: str) -> dict[str, str]:
    """The names of a fused layer's parts, such as {"q": "linear_q", …} of "linear_qkv"; of another layer none."""
    stem = "linear_" if fused == "linear_qkv" else f"{fused}_"
    return {part: f"{stem}{part}" for part in PARTS.get(fused, ())}


class FusedAdapter(torch.nn.Module):
    """Adapters beside some parts of a fused layer: `adapter_q`, `adapter_k` and `adapter_v`, or `adapter_gate` and
    `adapter_up`. Each is a `LowRankAdapter`.
    """

    def __init__(
        self, linear: CoreLinear, layout: LinearLayout, options: LoRAOptions, name: str, *, parts: Iterable[str]
    ) -> None:
        """Make the paths beside a layer.

        Args:
            linear: The fused layer.
            layout: How it is cut.
            options: Size of each path, and what else there is to choose.
            name: The layer's whole name.
            parts: Those that get a path.

        Raises:
            ValueError: The layer isn't made of these parts.
        """
        super().__init__()
        self.layout = layout
        fused = name.rpartition(".")[2]
        self.groups, rows = _group_rows(linear, layout, fused, name)
        self.rows = dict(zip(PARTS[fused], rows, strict=True))
        alone = replace(layout, is_gated=False, normalized=None)
        for part in parts:
            outputs = self.groups * self.rows[part]
            path = LowRankAdapter(linear.weight, alone, options, f"{name}.{part}", outputs=outputs)
            setattr(self, f"adapter_{part}", path)

    def forward(self, linear: CoreLinear, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """See `LowRankAdapter.forward`."""
        x = x if self.layout.normalized is None else self.layout.normalized(x)
        return output + self._fused({part: path.update(x) for part, path in self._paths()})

    def merged(self, linear: CoreLinear) -> torch.Tensor:
        """See `LowRankAdapter.merged`."""
        update = self._fused({part: path.update_of_weight().T for part, path in self._paths()}).T
        return (linear.weight.float() + update).to(linear.weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """See `LowRankAdapter.sharded_state_dict`."""
        state: ShardedStateDict = {}
        for part, path in self._paths():
            state.update(path.sharded_state_dict(f"{prefix}adapter_{part}.", sharded_offsets, metadata))
        return state

    def _paths(self) -> Iterator[tuple[str, LowRankAdapter]]:
        for name, path in self.named_children():
            if isinstance(path, LowRankAdapter):
                yield name.removeprefix("adapter_"), path

    def _fused(self, updates: dict[str, torch.Tensor]) -> torch.Tensor:
        """Updates of parts [..., rows of one] as one of the layer [..., its rows], zero elsewhere."""
        one = next(iter(updates.values()))
        pieces = [
            updates[part].unflatten(-1, (self.groups, rows))
            if part in updates
            else one.new_zeros((*one.shape[:-1], self.groups, rows))
            for part, rows in self.rows.items()
        ]
        return torch.cat(pieces, dim=-1).flatten(-2)


def _group_rows(linear: CoreLinear, layout: LinearLayout, fused: str, name: str) -> tuple[int, tuple[int, ...]]:
    """This rank's groups, within each of which the parts follow one another, and a part's rows in each."""
    config, ranks, rows = linear.config, layout.group.size(), linear.weight.shape[0]
    if fused == "linear_fc1":
        if not layout.is_gated:
            raise ValueError(
                f"peft.target_modules names linear_fc1_gate or linear_fc1_up, and {name} has no gate: expected a gated "
                'MLP; take LoRA with "linear_fc1"'
            )
        return 1, (rows // 2, rows // 2)
    groups, head = config.num_query_groups, config.kv_channels
    if groups % ranks:
        raise ValueError(
            f"peft is a CanonicalLoRA, and {name} has {groups} query groups on {ranks} ranks: each rank needs whole "
            f"groups; set model.tensor_model_parallel_size to a divisor of {groups}, or take LoRA"
        )
    of_group = (head * (config.num_attention_heads // groups), head, head)
    if groups // ranks * sum(of_group) != rows:
        raise ValueError(
            f"peft is a CanonicalLoRA, and {name} has {rows} rows: expected {groups // ranks * sum(of_group)}, those "
            "of query, key and value; take LoRA"
        )
    return groups // ranks, of_group
