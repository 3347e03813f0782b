# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The rotary positions of a Hugging Face configuration as fields of a provider."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.bridge.models.rope import mscale_of_attention_factor
from megatron.bridge.models.rope_by_length import longrope_attention_factor

logger = logging.getLogger(__name__)

_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_fields(hf: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """The provider's rotary fields.

    Args:
        hf: From `as_read_by_transformers`: `rope_parameters` has everything in transformers 5. Before, `rope_theta`
            stood by itself, and `rope_scaling` held the rest.
        partial: Whether the family turns only `partial_rotary_factor` of each head's channels.

    Raises:
        ValueError: A kind of scaling other than `_KINDS`, or a number that is none.
    """
    rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_parameters") or hf.get("rope_scaling") or {})}
    by_kind_of_layer = sorted(name for name, value in rope.items() if isinstance(value, dict))
    if by_kind_of_layer:
        raise ValueError(
            f"config.json: rotary parameters of their own for {by_kind_of_layer}: expected one set for all"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _KINDS:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported: expected one of {', '.join(_KINDS)}")
    fields: dict[str, Any] = {"rotary_base": rope_number(rope, "rope_theta")}
    if partial:
        fields["rotary_percent"] = _part_that_turns(hf, rope)
    else:
        _check_all_channels_turn(hf, rope, kind)
    if kind == "linear":
        fields["seq_len_interpolation_factor"] = rope_number(rope, "factor")
    elif kind == "llama3":
        fields["rope_scaling"] = True
        fields.update({f"rope_scaling_{name}": rope_number(rope, name) for name in ("factor", *_LLAMA3)})
    elif kind == "yarn":
        fields.update(_yarn_fields(hf, rope))
    elif kind == "dynamic":
        fields["position_embedding_type"] = "dynamic"
        fields["dynamic_rope_factor"] = _positive(rope, "factor")
        fields["dynamic_rope_max_position_embeddings"] = hf["max_position_embeddings"]
    elif kind == "longrope":
        fields.update(_longrope_fields(hf, rope))
    return fields


def rope_of_each_kind(hf: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The rotary positions of a family whose sliding layers have a base of their own.

    Args:
        hf: From `as_read_by_transformers`, with `rope_parameters` of each kind of layer.

    Returns:
        The configuration with those of its other layers, as `rope_fields` takes it, and the base of sliding layers.

    Raises:
        ValueError: Sliding layers have scaled positions.
    """
    rope = hf["rope_parameters"]
    local = rope["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json: rope_type={local['rope_type']!r} of sliding_attention is not supported: expected default"
        )
    return {**hf, "rope_parameters": rope["full_attention"]}, rope_number(local, "rope_theta")


def _longrope_fields(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of LongRoPE, with what transformers puts where the file says nothing."""
    original, given = _positive(rope, "original_max_position_embeddings"), _given(rope)
    factor = _positive(rope, "factor") if "factor" in given else rope_number(hf, "max_position_embeddings") / original
    attention = longrope_attention_factor(factor, int(original))
    return {
        "position_embedding_type": "longrope",
        "longrope_short_factor": _numbers(rope, "short_factor"),
        "longrope_long_factor": _numbers(rope, "long_factor"),
        "longrope_original_max_position_embeddings": original,
        "longrope_attention_factor": _positive(rope, "attention_factor") if "attention_factor" in given else attention,
    }


def _yarn_fields(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of YaRN, with what transformers puts where the file says nothing."""
    original = _positive(rope, "original_max_position_embeddings")
    given = _given(rope)
    factor = _positive(rope, "factor") if "factor" in given else rope_number(hf, "max_position_embeddings") / original
    fields = {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": original,
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }
    fields |= {f"yarn_{name}": _positive(rope, name) for name in ("beta_fast", "beta_slow") if rope.get(name)}
    if "attention_factor" in given:
        fields |= _mscales(factor, rope_number(rope, "attention_factor"))
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        fields |= {f"yarn_{name}": rope_number(rope, name) for name in ("mscale", "mscale_all_dim")}
    return fields


def _mscales(factor: float, attention_factor: float) -> dict[str, float]:
    if factor > 1:
        return {"yarn_mscale": mscale_of_attention_factor(factor, attention_factor), "yarn_mscale_all_dim": 0.0}
    if attention_factor != 1:
        raise ValueError(
            f"config.json: attention_factor={attention_factor} of the rotary positions with factor={factor}: Core has "
            "one for a factor above 1 only; expected 1"
        )
    return {}


def rope_number(rope: Mapping[str, Any], name: str) -> float:
    """A number of the rotary parameters.

    Raises:
        ValueError: It is missing, or none.
    """
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        found = "is missing" if value is None else f"is {value!r}"
        raise ValueError(f"config.json: {name} of the rotary positions (rope_parameters) {found}: expected a number")
    return value


def _numbers(rope: Mapping[str, Any], name: str) -> list[float]:
    found = rope.get(name)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(
            f"config.json: {name} of the rotary positions (rope_parameters) is {found!r}: expected a list of numbers"
        )
    return [rope_number({name: value}, name) for value in found]


def _positive(rope: Mapping[str, Any], name: str) -> float:
    value = rope_number(rope, name)
    if value <= 0:
        raise ValueError(
            f"config.json: {name} of the rotary positions (rope_parameters) is {value!r}: expected more than 0"
        )
    return value


def _part_that_turns(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    factor = _positive({"partial_rotary_factor": 1.0, **_given(hf), **_given(rope)}, "partial_rotary_factor")
    if factor > 1:
        raise ValueError(f"config.json: partial_rotary_factor={factor}: expected 1 or less")
    return factor


def _given(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hf.items() if value is not None}


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
