# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`generation_config.json`: the tokens at which transformers' `generate` stops, and this package's with it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "generation_config.json"

_UNANSWERED = "\ue000"
"""Stands for an answer in a conversation: a character for private use, which no template writes."""

_CONVERSATION = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": _UNANSWERED})
_WITH_SYSTEM = ({"role": "system", "content": "Be kind."}, *_CONVERSATION)

_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "penalty_alpha": 0.0,
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("watermarking_config", "dola_layers", "constraints", "force_words_ids")),
}
"""Settings that change which token is the likeliest, or when a text ends, with the value that does nothing."""


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """What the `generation_config.json` of a directory says; None where there is none.

    Raises:
        ValueError: It is damaged, or its end tokens aren't token ids.
    """
    path = directory / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore the file from another copy") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    _check_end_ids(content, path)
    return content


def generation_config_of_model(directory: Path) -> dict[str, Any]:
    """The settings that transformers takes for a model's directory.

    They are those of `generation_config.json`, whatever `config.json` says beside it; without that file, those that
    are written in `config.json`. A class's default for `eos_token_id` doesn't count.

    Raises:
        ValueError: A file is damaged, or the end tokens aren't token ids.
    """
    content = read_generation_config(directory)
    if content is not None:
        return content
    from transformers import GenerationConfig  # here, so that a look at a directory doesn't cost the import

    from megatron.bridge.models.conversion.hf_config import read_hf_config

    config = read_hf_config(directory)
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    content = {name: config[name] for name in sorted(known) if config.get(name) is not None}
    _check_end_ids(content, directory / "config.json")
    return {"eos_token_id": None, **content}


def write_generation_config(directory: Path, content: Mapping[str, Any]) -> None:
    """Write `generation_config.json` into a directory."""
    (directory / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def end_ids(content: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text."""
    found = content.get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def with_end_ids(content: Mapping[str, Any], more: Iterable[int]) -> dict[str, Any]:
    """The settings with more tokens that end a text, behind those that they have."""
    ids = end_ids(content)
    added = [token for token in dict.fromkeys(more) if token not in ids]
    return {**content, "eos_token_id": [*ids, *added]} if added else dict(content)


def learned_end_ids(hf_tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a model learns to end with: EOS, and what the chat template writes behind an answer.

    Args:
        hf_tokenizer: transformers' tokenizer.
    """
    eos, turn_end = hf_tokenizer.eos_token_id, _turn_end(hf_tokenizer)
    return tuple(dict.fromkeys(token for token in (eos, turn_end) if token is not None))


def not_applied(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that transformers' `generate` heeds with greedy tokens, and this package's doesn't."""
    given = {name: content.get(name) for name in _NEUTRAL}
    return {name: value for name, value in given.items() if value is not None and value != _NEUTRAL[name]}


def _turn_end(hf_tokenizer: Any) -> int | None:
    """The special token behind the last answer of a conversation; None where no template writes one."""
    if not hf_tokenizer.chat_template:
        return None
    for conversation in (_CONVERSATION, _WITH_SYSTEM):
        try:
            text = hf_tokenizer.apply_chat_template(list(conversation), tokenize=False)
        except Exception:  # a template is a program, in a sandbox; this one refuses the conversation
            continue
        _, answer, rest = text.rpartition(_UNANSWERED)
        tokens = {token.content: index for index, token in hf_tokenizer.added_tokens_decoder.items()}
        behind = [token for token in tokens if token.strip() and rest.lstrip().startswith(token)]
        return tokens[max(behind, key=len)] if answer and behind else None
    return None


def _check_end_ids(content: Mapping[str, Any], path: Path) -> None:
    found = content.get("eos_token_id")
    for token in found if isinstance(found, list) else [found]:
        if token is not None and type(token) is not int:
            raise ValueError(f"{path}: eos_token_id={found!r}: expected a token's id, a list of them, or null")
