# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The rotary positions of a Hugging Face configuration as fields of a provider."""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The provider's rotary fields.

    Args:
        hf: From `as_read_by_transformers`: `rope_parameters` has everything in transformers 5. Before, `rope_theta`
            stood by itself, and `rope_scaling` held the rest.

    Raises:
        ValueError: A kind of scaling other than "default", "linear" and "llama3", or a number that is none.
    """
    rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_parameters") or hf.get("rope_scaling") or {})}
    by_kind_of_layer = sorted(name for name, value in rope.items() if isinstance(value, dict))
    if by_kind_of_layer:
        raise ValueError(
            f"config.json: rotary parameters of their own for {by_kind_of_layer}: expected one set for all"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"config.json: rope_type={kind!r} is not supported: expected default, linear or llama3")
    _check_all_channels_turn(hf, rope, kind)
    fields: dict[str, Any] = {"rotary_base": _number(rope, "rope_theta")}
    if kind == "linear":
        fields["seq_len_interpolation_factor"] = _number(rope, "factor")
    elif kind == "llama3":
        fields["rope_scaling"] = True
        fields.update({f"rope_scaling_{name}": _number(rope, name) for name in ("factor", *_LLAMA3)})
    return fields


def _number(rope: Mapping[str, Any], name: str) -> float:
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        found = "is missing" if value is None else f"is {value!r}"
        raise ValueError(f"config.json: {name} of the rotary positions (rope_parameters) {found}: expected a number")
    return value


def _check_all_channels_turn(hf: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> None:
    """These families turn all channels of a head: transformers ignores the factor without scaling, and fails with."""
    factor = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if factor in (None, 1):
        return
    if kind != "default":
        raise ValueError(
            f"config.json: partial_rotary_factor={factor!r} with rope_type={kind!r} is not supported for "
            f"{hf['architectures']}: expected 1"
        )
    logger.warning("config.json: partial_rotary_factor=%r is ignored, as by transformers for this family", factor)
