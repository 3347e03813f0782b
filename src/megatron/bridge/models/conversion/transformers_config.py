# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Read a `config.json` as transformers does: its configuration classes have the defaults of missing keys."""

import copy
import math
from collections.abc import Mapping
from typing import Any

NEEDED_SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
"""Keys that a file must have. The default in transformers' class is only the size of one model of the family."""
SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Model types with code of their own that reads what transformers reads, by the type that it is to transformers."""
_OF_THE_FILE = ("dtype", "torch_dtype", "quantization_config")
"""Keys about the weights' files instead of the model. They are kept unchanged."""


def as_read_by_transformers(hf_config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Every key of a Hugging Face configuration, in the form and with the defaults of transformers' class.

    Args:
        hf_config: Content of `config.json`, of any age.
        architecture: One that it names, such as `LlamaForCausalLM`.

    Raises:
        ValueError: It lacks a size, or transformers doesn't read it: a value of a wrong type, sizes that contradict
            each other, …
    """
    config_class = config_class_of(architecture, hf_config)
    for key in absent_sizes(hf_config, config_class):
        raise ValueError(f"config.json lacks {key!r}, which {architecture} needs: restore the file from another copy")
    model_type = hf_config.get("model_type", config_class.model_type)
    model_type = SAME_AS.get(model_type, model_type)
    if model_type != (config_class.model_type or model_type):
        raise ValueError(
            f"config.json: model_type={model_type!r}, and architectures names {architecture}, whose model_type is "
            f"{config_class.model_type!r}: transformers goes by model_type; correct the one that is wrong"
        )
    # A copy: transformers fills in what is nested.
    content = _with_all_floats({key: value for key, value in hf_config.items() if key not in _OF_THE_FILE})
    try:
        config = config_class.from_dict(content)
        if getattr(config, "rope_parameters", None):
            config.standardize_rope_params()  # again, as its models do: by now it has keys that no field is for
        read = config.to_dict()
    except Exception as error:  # its checks raise several classes, some of them of huggingface_hub
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"config.json: transformers' {config_class.__name__} refuses it ({reason}): correct that key"
        ) from error
    return {**read, **{key: hf_config[key] for key in _OF_THE_FILE if key in hf_config}}


_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _with_all_floats(value: Any) -> Any:
    """A copy of what a `config.json` holds, where {"__float__": "Infinity"} stands for a float that JSON lacks."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in tuple(_FLOATS):
            return _FLOATS[value["__float__"]]
        return {key: _with_all_floats(one) for key, one in value.items()}
    return [_with_all_floats(one) for one in value] if isinstance(value, list) else copy.deepcopy(value)


def check_transformers_knows(architecture: str, hf_config: Mapping[str, Any]) -> None:
    """Refuse a family that came with a later transformers than the installed one.

    Args:
        architecture: One that a family of this package is for.
        hf_config: Content of the `config.json` that names it.

    Raises:
        ValueError: Transformers has no configuration class for it.
    """
    import transformers  # as below

    if config_class_of(architecture, hf_config) is transformers.PretrainedConfig:
        raise ValueError(
            f"config.json names {architecture}, which transformers {transformers.__version__} doesn't know: install a "
            "newer one (pip install --upgrade transformers)"
        )


def absent_sizes(hf_config: Mapping[str, Any], config_class: Any) -> list[str]:
    """The needed sizes that a Hugging Face configuration lacks. A model of experts alone needs no size of an MLP.

    Args:
        hf_config: Content of `config.json`.
        config_class: From `config_class_of`.
    """
    absent = [key for key in NEEDED_SIZES if key not in hf_config]
    if absent == ["intermediate_size"]:
        has_mlp = hasattr(config_class(), "intermediate_size") or "moe_intermediate_size" not in hf_config
        return absent if has_mlp else []
    return absent


def expect_value(hf: Mapping[str, Any], key: str, expected: Any) -> None:
    """Refuse a Hugging Face configuration that asks for what the family's table can't express.

    Raises:
        ValueError: The key is there, and not `expected`.
    """
    found = hf.get(key, expected)
    if found != expected:
        raise ValueError(f"config.json: {key}={found!r} is not supported for {hf['architectures']}: need {expected!r}")


def config_class_of(architecture: str, hf_config: Mapping[str, Any]) -> Any:
    """Transformers' configuration class of an architecture; of one that it doesn't know, that of its `model_type`.

    Args:
        architecture: Such as `LlamaForCausalLM`.
        hf_config: Content of the `config.json` that names it.
    """
    import transformers  # here, so that a look at a directory doesn't cost the import

    family = architecture.removesuffix("ForCausalLM")
    for name in (f"{family}TextConfig", f"{family}Config"):  # a family with images has one of each
        if hasattr(transformers, name):
            return getattr(transformers, name)
    by_type, model_type = transformers.CONFIG_MAPPING, hf_config.get("model_type")
    return by_type[model_type] if model_type in by_type else transformers.PretrainedConfig


def config_object(hf_config: Mapping[str, Any]) -> Any:
    """Transformers' configuration object (`PretrainedConfig`) of the content of a `config.json`."""
    return config_class_of(hf_config["architectures"][0], hf_config).from_dict(_with_all_floats(dict(hf_config)))
