# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a Hugging Face model has and the converted one doesn't: layers that predict further tokens, empty tensors.

They are named once when weights are read, and an export doesn't speak of them.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from megatron.core.transformer import TransformerConfig

from megatron.bridge.models.conversion.transformers_config import SAME_AS
from megatron.bridge.models.families import ModelFamily

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OF_KEYS = re.compile(r"\.self_attn\.[kv]_(proj|norm)\.weight$")
_APART = "mtp."
"""Before the names of Qwen's."""
_FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Keys of `config.json` that count them, as published and as transformers 5.20 and later names them."""


def may_be_ignored(name: str, config: TransformerConfig, family: ModelFamily) -> bool:
    """Whether a file may hold a tensor that the model has no place for.

    Args:
        name: The tensor's.
        config: The provider that the model was built from.
        family: The model's.
    """
    if config.share_embeddings_and_output_weights and name == "lm_head.weight":
        return True
    if is_of_further_layer(name, config, family) or is_of_no_shared_expert(name, config):
        return True
    if is_of_taken_keys(name, config):
        return True
    return any(fnmatchcase(name, pattern) for pattern in family.ignored_tensors)


def is_of_further_layer(name: str, config: TransformerConfig, family: ModelFamily) -> bool:
    """Whether a tensor belongs to a layer after the last one, or stands apart as Qwen's."""
    layer = _LAYER.match(name)
    is_after = name.startswith(_APART) if layer is None else int(layer[1]) >= config.num_layers
    return family.has_further_layers and is_after


def is_of_taken_keys(name: str, config: TransformerConfig) -> bool:
    """Whether a tensor makes keys or values of a layer that takes those of another (Gemma 4), so that nothing reads it.

    Published files hold such tensors, and transformers leaves them out, too.
    """
    layer = _LAYER.match(name)
    return layer is not None and config.takes_keys(int(layer[1]) + 1) and bool(_OF_KEYS.search(name))


def is_of_no_shared_expert(name: str, config: TransformerConfig) -> bool:
    """Whether a tensor is one of shared experts, which the model hasn't; transformers then writes it without values."""
    return ".shared_experts." in name and not config.moe_shared_expert_intermediate_size


def say_what_is_left_out(names: Iterable[str], config: TransformerConfig, family: ModelFamily) -> str | None:
    """One line about the layers in some files that aren't read; None if there are none.

    Args:
        names: The tensors' in the files; as above for the others.
    """
    names = list(names)
    unread = [name for name in names if is_of_taken_keys(name, config)]
    if unread:
        return (
            f"{len(unread)} tensors of keys and values in layers that take another layer's, such as {unread[0]}, are "
            "left out: the model doesn't read them, and exports don't hold them"
        )
    found = [name for name in names if is_of_further_layer(name, config, family)]
    if not found:
        return None
    where = f"{_APART}*" if found[0].startswith(_APART) else f"layers from model.layers.{config.num_layers} on"
    return (
        f"{len(found)} tensors of {where}, which predict further tokens "
        "(multi-token prediction), are left out: they are neither trained nor exported"
    )


def config_of_export(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that says no more than an export holds: no further layers, and weights that aren't quantised."""
    dropped = {"quantization_config"}
    model_type = hf_config.get("model_type")
    if model_type in SAME_AS:
        dropped.add("auto_map")  # an export has no code
    kept = {key: value for key, value in hf_config.items() if key not in dropped}
    if model_type in SAME_AS:
        kept["model_type"] = SAME_AS[model_type]
    return {key: 0 if key in _FURTHER_LAYERS and value else value for key, value in kept.items()}
