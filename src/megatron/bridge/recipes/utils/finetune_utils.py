# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the adapters that recipes use, and of well-known datasets."""

from typing import Any

from megatron.bridge.data.config import GPTSFTDatasetConfig, PackedSequenceSpecs
from megatron.bridge.recipes.common import default_peft_config

__all__ = ["default_gsm8k_config", "default_openmathinstruct2_config", "default_peft_config", "default_squad_config"]


def default_squad_config(
    seq_length: int, packed_sequence: bool = False, pad_seq_to_mult: int = 1, **fields: Any
) -> GPTSFTDatasetConfig:
    """SQuAD: questions about a passage.

    Args:
        seq_length: Longest sample in tokens.
        packed_sequence: Whether to pack samples into rows of that length.
        pad_seq_to_mult: In a pack, each sample is padded to a multiple of this.
        fields: Further fields of the configuration.
    """
    return _config_of("squad", seq_length, packed_sequence, pad_seq_to_mult, fields)


def default_gsm8k_config(
    seq_length: int, packed_sequence: bool = False, pad_seq_to_mult: int = 1, **fields: Any
) -> GPTSFTDatasetConfig:
    """GSM8K: word problems with their solutions; arguments as for `default_squad_config`."""
    return _config_of("gsm8k", seq_length, packed_sequence, pad_seq_to_mult, fields)


def default_openmathinstruct2_config(
    seq_length: int = 4096, packed_sequence: bool = True, pad_seq_to_mult: int = 1, **fields: Any
) -> GPTSFTDatasetConfig:
    """A million problems of OpenMathInstruct-2, with generated solutions; arguments as for `default_squad_config`."""
    return _config_of("openmathinstruct2", seq_length, packed_sequence, pad_seq_to_mult, fields)


def _config_of(
    preset: str, seq_length: int, packed_sequence: bool, pad_seq_to_mult: int, fields: dict[str, Any]
) -> GPTSFTDatasetConfig:
    packing: dict[str, Any] = {}
    if packed_sequence:
        specs = PackedSequenceSpecs(packed_sequence_size=seq_length, pad_seq_to_mult=pad_seq_to_mult)
        packing = {"enable_offline_packing": True, "offline_packing_specs": specs}
    return GPTSFTDatasetConfig(seq_length, **{"hf_dataset": preset, "do_test": False, **packing, **fields})
