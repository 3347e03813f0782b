# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A family's table of weights, as a script registers it."""

from collections.abc import Iterator

from megatron.bridge.models.conversion.mapping import WeightMapping
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

__all__ = ["MegatronMappingRegistry"]

_LAYER = "decoder.layers.{layer}."
_EXPERTS = f"{_LAYER}mlp.experts."
_SAME_WEIGHT = [
    (f"{_LAYER}self_attention.linear_qkv.layer_norm_weight", f"{_LAYER}input_layernorm.weight"),
    (f"{_LAYER}self_attention.linear_qkv.layer_norm_bias", f"{_LAYER}input_layernorm.bias"),
    (f"{_LAYER}mlp.linear_fc1.layer_norm_weight", f"{_LAYER}pre_mlp_layernorm.weight"),
    (f"{_LAYER}mlp.linear_fc1.layer_norm_bias", f"{_LAYER}pre_mlp_layernorm.bias"),
    (f"{_EXPERTS}linear_fc1.weight{{expert}}", f"{_EXPERTS}local_experts.{{expert}}.linear_fc1.weight"),
    (f"{_EXPERTS}linear_fc2.weight{{expert}}", f"{_EXPERTS}local_experts.{{expert}}.linear_fc2.weight"),
]
"""Names that one weight has in Transformer Engine's layers, and in Core's local ones."""


class MegatronMappingRegistry:
    """The weights of a family, in any order.

    A weight that Transformer Engine's layers name otherwise than Core's local ones needs to be named once.

    Args:
        mappings: One for each weight that a model of the family may have.

    Raises:
        ValueError: A mapping doesn't say how ranks share its weight, or two name the same weight.
    """

    def __init__(self, *mappings: MegatronParamMapping) -> None:
        self._mappings = mappings
        self._rows: dict[str, WeightMapping] = {}
        for row in (mapping.to_weight_mapping() for mapping in mappings):
            if row.megatron_name in self._rows:
                raise ValueError(f"two mappings are for {row.megatron_name!r}: leave one out")
            self._rows[row.megatron_name] = row
        for pair in _SAME_WEIGHT:
            for name, other in (pair, pair[::-1]):
                if name in self._rows and other not in self._rows:
                    row = self._rows[name]
                    self._rows[other] = WeightMapping(other, row.hf_names, row.layout, row.dim)

    def get_all_mappings(self) -> list[MegatronParamMapping]:
        """The mappings that were given."""
        return list(self._mappings)

    def weight_mappings(self) -> tuple[WeightMapping, ...]:
        """The rows of the family's table."""
        return tuple(self._rows.values())

    def __iter__(self) -> Iterator[MegatronParamMapping]:
        return iter(self._mappings)

    def __len__(self) -> int:
        return len(self._mappings)
