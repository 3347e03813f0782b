# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A family's table by the names that scripts for Megatron Bridge use: which Hugging Face tensors make a weight.

Names hold `*` for the number of the layer and, after it, for that of the expert. What is written here becomes rows of
`mapping.py`.
"""

import re
from dataclasses import dataclass

from megatron.bridge.models.conversion.mapping import (
    WeightMapping,
    fused_gate_up,
    fused_qkv,
    replicated,
    split_columns,
    split_rows,
    vocabulary,
)

__all__ = [
    "AutoMapping",
    "ColumnParallelMapping",
    "GatedMLPMapping",
    "MegatronParamMapping",
    "QKVMapping",
    "ReplicatedMapping",
    "RowParallelMapping",
]

_BY_NAME = (
    (r"(embedding\.word_embeddings|output_layer)\.weight", vocabulary),
    (r".*(norm|norm_weight|norm_bias|norm\.weight|norm\.bias)", replicated),
    (r".*(router\.weight|router\.expert_bias|linear_proj\.bias|linear_fc2\.bias)", replicated),
    (r".*(linear_proj|linear_fc2)\.weight(\{expert\})?", split_columns),
    (r".*(linear_fc1|linear_qkv)\.(weight(\{expert\})?|bias)", split_rows),
)
"""How ranks share the weights of Core's GPT, by the names that its modules have."""


class MegatronParamMapping:
    """One weight, or one in every layer or expert."""

    def to_weight_mapping(self) -> WeightMapping:
        """The row of a family's table."""
        raise NotImplementedError(f"{type(self).__name__} says nothing: take one of the mappings in this module")


@dataclass(frozen=True)
class _OneTensor(MegatronParamMapping):
    megatron_param: str
    hf_param: str

    @property
    def names(self) -> tuple[str, str]:
        return numbered(self.megatron_param), numbered(self.hf_param)


class ReplicatedMapping(_OneTensor):
    """A weight that every tensor-parallel rank holds whole."""

    def to_weight_mapping(self) -> WeightMapping:
        """The row of a family's table."""
        return replicated(*self.names)


class ColumnParallelMapping(_OneTensor):
    """A matrix, or a bias, whose output features are split."""

    def to_weight_mapping(self) -> WeightMapping:
        """The row of a family's table."""
        return split_rows(*self.names)


class RowParallelMapping(_OneTensor):
    """A matrix whose input features are split."""

    def to_weight_mapping(self) -> WeightMapping:
        """The row of a family's table."""
        return split_columns(*self.names)


class AutoMapping(_OneTensor):
    """A weight of Core's GPT whose name says how ranks share it."""

    def to_weight_mapping(self) -> WeightMapping:
        """The row of a family's table.

        Raises:
            ValueError: The name doesn't say it.
        """
        megatron_name, hf_name = self.names
        for pattern, row in _BY_NAME:
            if re.fullmatch(pattern, megatron_name):
                return row(megatron_name, hf_name)
        raise ValueError(
            f"AutoMapping doesn't know how ranks share {self.megatron_param!r}: take ReplicatedMapping, "
            "ColumnParallelMapping or RowParallelMapping"
        )


@dataclass(frozen=True)
class QKVMapping(MegatronParamMapping):
    """Query, key and value in one matrix, or bias."""

    megatron_param: str
    q: str
    k: str
    v: str

    def to_weight_mapping(self) -> WeightMapping:
        """The row of a family's table."""
        return fused_qkv(numbered(self.megatron_param), q=numbered(self.q), k=numbered(self.k), v=numbered(self.v))


@dataclass(frozen=True)
class GatedMLPMapping(MegatronParamMapping):
    """A gated MLP's two input matrices in one."""

    megatron_param: str
    gate: str
    up: str

    def to_weight_mapping(self) -> WeightMapping:
        """The row of a family's table."""
        return fused_gate_up(numbered(self.megatron_param), gate=numbered(self.gate), up=numbered(self.up))


def numbered(name: str) -> str:
    """A name with `*` for numbers as a table of `mapping.py` has it.

    Raises:
        ValueError: More than two numbers, the layer's and the expert's.
    """
    if name.count("*") > 2:
        raise ValueError(f"{name!r} has {name.count('*')} numbers: expected the layer's and the expert's at most")
    return name.replace("*", "{layer}", 1).replace("*", "{expert}", 1)
