# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The language model inside one that takes images too: it is converted, trained and exported as a model of its own."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.bridge.models.conversion.transformers_config import absent_sizes, config_class_of

TEXT_TOWERS: dict[str, str | dict[str, str]] = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
}
"""The architecture of the language model by that of the whole; where it may be one of several, by its `model_type`, of
which the first is meant where the file has none."""

_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""How files name the language model's tensors, and how its own files would."""
_OF_BOTH = ("lm_head.", "mtp.")
"""How names begin that stand outside the language model in files of the whole, and are the same in its own."""
_OF_THE_WHOLE = (
    *("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys that a file has beside `text_config`, and that go before those within it."""


def whole_of_text_tower(hf_config: Mapping[str, Any]) -> str | None:
    """The architecture, of those in a Hugging Face configuration, of a model whose language model can be taken."""
    return next((name for name in hf_config.get("architectures") or () if name in TEXT_TOWERS), None)


def as_text_model(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model's language model alone; that of a model without images is returned as it is.

    Args:
        hf_config: Content of `config.json`.

    Raises:
        ValueError: It lacks `text_config`, or has a language model of another kind in it.
    """
    whole = whole_of_text_tower(hf_config)
    if whole is None:
        return hf_config
    text = hf_config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(
            f"config.json of a {whole} has text_config={text!r}: expected the fields of its language model; restore "
            "the file from another copy"
        )
    architecture = _architecture_within(whole, text)
    config_class = config_class_of(architecture, text)
    absent = absent_sizes(text, config_class)  # published files leave out what the class's default says
    defaults = config_class() if absent else None
    return {
        **{key: getattr(defaults, key) for key in absent},
        **text,
        **{key: hf_config[key] for key in _OF_THE_WHOLE if key in hf_config},
        "architectures": [architecture],
        "model_type": config_class.model_type,
    }


def _architecture_within(whole: str, text: Mapping[str, Any]) -> str:
    known = TEXT_TOWERS[whole]
    if isinstance(known, str):
        return known
    model_type = text.get("model_type", next(iter(known)))
    if model_type not in known:
        raise ValueError(
            f"config.json of a {whole}: text_config.model_type={model_type!r} is not supported: expected one of "
            f"{', '.join(known)}"
        )
    return known[model_type]


def text_names(stored: Iterable[str]) -> dict[str, str]:
    """The tensors of the language model.

    Args:
        stored: The names in a model's files.

    Returns:
        By the name in files of its own, the name in these. Files of a language model alone have all their names.
    """
    stored = list(stored)
    found = {
        own + name.removeprefix(prefix): name
        for name in stored
        for prefix, own in _PREFIXES.items()
        if name.startswith(prefix)
    }
    own = [name for name in stored if not found or name.startswith(_OF_BOTH)]
    return {**found, **{name: name for name in own}}
