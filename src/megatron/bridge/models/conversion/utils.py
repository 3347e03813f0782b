# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the table that compares a converted model with the files that it came from."""

from typing import TYPE_CHECKING

from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.conversion.bridge_base import as_chunks
from megatron.bridge.models.conversion.expert_stacks import open_weights
from megatron.bridge.models.conversion.roundtrip import as_table, compare_with_files

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.bridge_base import Model

__all__ = ["weights_verification_table"]


def weights_verification_table(bridge: AutoBridge, megatron_model: "Model") -> str:
    """Export a model and compare each tensor, bit-exact, with the files of its Hugging Face directory. Collective.

    Args:
        bridge: Of the directory.
        megatron_model: This rank's chunks, wrapped or not.

    Returns:
        A table as text, one line a tensor: `equal`, or what differs.

    Raises:
        FileNotFoundError, ValueError: There is no such directory, or it holds no weights.
    """
    weights = open_weights(bridge._weights_directory(None), bridge.family.stacks_in_files)
    return as_table(compare_with_files(as_chunks(megatron_model), bridge.family, weights, show_progress=False))
