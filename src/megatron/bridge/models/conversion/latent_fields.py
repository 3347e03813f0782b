# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Latent attention and its rotary positions in a Hugging Face configuration, as fields of a provider."""

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.conversion.transformers_config import expect_value
from megatron.bridge.models.rope import mscale_of_attention_factor, yarn_attention_factor, yarn_mscale
from megatron.bridge.models.rope_by_length import BY_LENGTH

_OF_YARN = {
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""Core's names in latent attention, and those in any other."""
_NOT_LATENT = {"seq_len_interpolation_factor": "linear", "rope_scaling": "llama3"}


def latent_fields(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a decoder with latent attention.

    Args:
        hf: From `as_read_by_transformers`.
        fields: From `decoder_fields`.

    Raises:
        ValueError: The configuration asks for what Core's latent attention can't express.
    """
    expect_value(hf, "attention_bias", False)
    expect_value(hf, "num_key_value_heads", hf["num_attention_heads"])
    for name, kind in _NOT_LATENT.items():
        if name in fields:
            raise ValueError(
                f"config.json: rope_type={kind!r} is not supported for {hf['architectures']}: expected default or yarn"
            )
    by_length = fields.get("position_embedding_type", "rope")
    if by_length in BY_LENGTH:
        raise ValueError(
            f"config.json: rope_type={by_length!r} is not supported for {hf['architectures']}: expected default or yarn"
        )
    plain = {name: value for name, value in fields.items() if not name.startswith("yarn_")}
    if plain.pop("position_embedding_type", None) == "yarn":
        plain |= _yarn_fields(hf.get("rope_parameters") or hf["rope_scaling"], fields)
    return {
        **plain,
        "kv_channels": hf["v_head_dim"],
        "q_lora_rank": hf["q_lora_rank"],
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
    }


def _yarn_fields(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's numbers. Its `mscale_all_dim` also scales the scores, whatever cosine and sine are multiplied by."""
    factor, of_all = fields["yarn_rotary_scaling_factor"], rope.get("mscale_all_dim") or 0.0
    found = {latent: fields[name] for latent, name in _OF_YARN.items() if name in fields}
    of_positions = rope.get("mscale")
    if rope.get("attention_factor") is not None or not (of_positions and of_all):
        attention = yarn_attention_factor(factor, fields.get("yarn_mscale"), fields.get("yarn_mscale_all_dim"))
        scaled = attention * yarn_mscale(factor, of_all)
        of_positions = mscale_of_attention_factor(factor, scaled) if factor > 1 else 1.0
    rounds = fields["yarn_correction_range_round_to_int"]
    return {
        "rope_type": "yarn",
        **found,
        "mscale": of_positions,
        "mscale_all_dim": of_all,
        "yarn_correction_range_round_to_int": rounds,
    }
