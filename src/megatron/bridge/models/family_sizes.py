# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What sizes, counts and checks ask of a family's provider. Most families give the answers here."""

from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.models.layer_kinds import LayerKind


class FamilySizes:
    """A part of every GPT's provider. Families whose layers differ in more than a GPT's override its methods."""

    if TYPE_CHECKING:  # of Core's TransformerConfig, which a provider is too
        num_attention_heads: int
        num_query_groups: int | None

    num_kv_projections: ClassVar[int] = 2
    """Of keys and of values, in the layers of a kind: see `sizes_of`."""

    def sizes_of(self, kind: LayerKind) -> Any:
        """The provider's fields as they are for attention and MLP in a kind of layer: itself, or a copy."""
        return self

    def takes_keys(self, layer_number: int) -> bool:
        """Whether a layer has the keys and values of a layer before it.

        Args:
            layer_number: From 1, over all pipeline stages.
        """
        return False

    def layer_input_channels(self) -> int:
        """Channels of the input that each layer has of its own. 0: layers have none."""
        return 0

    def heads_by_field(self) -> dict[str, int]:
        """Query heads and query groups, which ranks share, by the field that says how many there are."""
        return {
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups or self.num_attention_heads,
        }
