# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Reading a Hugging Face `config.json`, and the parts of it that families share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

from megatron.bridge.models.conversion.text_tower import as_text_model, whole_of_text_tower
from megatron.bridge.models.vocab_padding import largest_divisor


def config_as_dict(config: "PretrainedConfig | Mapping[str, Any]") -> dict[str, Any]:
    """A Hugging Face configuration object, or the content of a `config.json`, as a dict that names its architecture.

    Of a model that takes images too, it is that of its language model.
    """
    if isinstance(config, Mapping):
        return as_text_model(dict(config))
    content = config.to_dict()
    if not content.get("architectures"):
        family = type(config).__name__.removesuffix("Config").removesuffix("Text")
        content["architectures"] = [f"{family}For{'ConditionalGeneration' if 'text_config' in content else 'CausalLM'}"]
    return as_text_model(content)


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Read `config.json` of a Hugging Face directory; of a model that takes images too, that of its language model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a JSON object, or the directory holds adapters alone.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        check_whole_model(path.parent)
        raise FileNotFoundError(f"{path} is missing: expected the directory of a Hugging Face model") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore the file from another copy") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}: expected a JSON object")
    return as_text_model(config)


def check_whole_model(directory: Path) -> None:
    """Refuse a directory with adapters of the peft library: transformers puts them over the weights that it loads.

    Raises:
        ValueError: There are some.
    """
    path = directory / "adapter_config.json"
    if path.is_file():
        raise ValueError(
            f"{path}: the directory holds adapters of the peft library, which are not converted; merge them into the "
            "model (PeftModel.merge_and_unload) and name what that saves, or remove the file if they are merged already"
        )


def check_language_model_alone(directory: Path) -> None:
    """Refuse a model that takes images too: adapters of its language model have other names than peft gives the whole.

    Args:
        directory: Holds its `config.json`.

    Raises:
        ValueError: It is one.
    """
    path = directory / "config.json"
    whole = whole_of_text_tower(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    if whole is not None:
        raise ValueError(
            f"{path} is that of a {whole}, and the adapters were trained in its language model alone: peft would look "
            "for them elsewhere; export the language model with the adapters merged (export), which gives a model of "
            "its own"
        )


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """Refuse a model whose tokenizer has ids without a row in the embedding.

    Args:
        directory: With or without a `tokenizer.json`.
        vocab_size: Rows of the embedding.

    Raises:
        ValueError: It is larger, or damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = (content.get("model") or {}).get("vocab") or {}
        ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        largest = max(ids, default=-1)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore the file from another copy") from None
    if largest >= vocab_size:
        raise ValueError(
            f"{path} has ids up to {largest}, but config.json says vocab_size={vocab_size}: take the tokenizer that "
            "belongs to the model"
        )


DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that Megatron's parameters have."""


def dtype_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The provider's precision fields for weights of the configuration's dtype; quantised ones are read as bf16.

    Raises:
        ValueError: A dtype that Megatron has no parameters in.
    """
    default = "bfloat16" if hf.get("quantization_config") else "float32"
    return precision_fields(hf.get("dtype") or hf.get("torch_dtype") or default, where="config.json: ")


def precision_fields(dtype: "str | torch.dtype", *, where: str = "") -> dict[str, Any]:
    """The provider's precision fields for weights of a dtype.

    Args:
        dtype: One of `DTYPES`, or torch's.
        where: Where it was asked for, for the error.

    Raises:
        ValueError: A dtype that Megatron has no parameters in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{where}dtype={name!r} is not supported: expected float32, bfloat16 or float16")
    import torch  # here, so that a look at a directory doesn't cost the import

    params_dtype = getattr(torch, name)
    return {
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype is torch.bfloat16,
        "fp16": params_dtype is torch.float16,
    }


def vocabulary_fields(vocab_size: int) -> dict[str, Any]:
    """Let ranks share any vocabulary, without padding at tensor-parallel size 1."""
    return {"should_pad_vocab": True, "make_vocab_size_divisible_by": largest_divisor(vocab_size)}
