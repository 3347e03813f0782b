# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The prompts that a command line gives, as text and as tokens, and whether there is room for what follows them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.bridge.inference.tokenizer import HFTokenizerAdapter

KEYS = ("prompt", "text", "input")
"""Under which a row of a file may hold its prompt."""


def load_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of a command line: those of `--prompts`, then those of `--prompt-file`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: There are none, or the file holds something else.
    """
    prompts = [args.prompts] if isinstance(args.prompts, str) else list(args.prompts or ())
    if args.prompt_file is not None:
        read = _read_file(Path(args.prompt_file))
        limit = getattr(args, "prompt_file_num_truncate", None)
        prompts += read if limit is None else read[:limit]
    if not prompts:
        raise ValueError("there are no prompts: pass --prompts or --prompt-file")
    return prompts


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): expected text") from None
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"--prompt-file {path} is not there: expected a file with prompts") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        return [_prompt_of(_parsed(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines]
    if path.suffix == ".json":
        rows = _parsed(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}: expected a list of prompts")
        return [_prompt_of(row, f"{path}, entry {number}") for number, row in enumerate(rows, 1)]
    return [line.rstrip("\r") for _, line in lines]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from None


def _prompt_of(row: Any, where: str) -> str:
    found = next((row[key] for key in KEYS if key in row), None) if isinstance(row, dict) else row
    if not isinstance(found, str):
        raise ValueError(f"{where} holds no prompt: expected a string, or an object with {', '.join(KEYS)}")
    return found


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: "HFTokenizerAdapter",
    *,
    chat: bool = False,
    system: str | None = None,
    add_bos: bool = False,
) -> list[list[int]]:
    """The tokens of prompts.

    Args:
        prompts: Texts.
        tokenizer: Makes the tokens.
        chat: Each prompt is the message of a user, put into the chat template.
        system: With `chat`: the system message.
        add_bos: Begin with BOS though the tokenizer doesn't put it.

    Raises:
        ValueError: The options contradict each other, or the tokenizer lacks what they ask for.
    """
    if not chat:
        if system is not None:
            raise ValueError("--system is part of a conversation: add --chat")
        rows = [tokenizer.tokenize(prompt) for prompt in prompts]
        return [with_bos(row, tokenizer) for row in rows] if add_bos else rows
    if add_bos:
        raise ValueError("--add-bos with --chat: the chat template begins the text; leave it out")
    first = [] if system is None else [{"role": "system", "content": system}]
    conversations = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
    options = {"tokenize": False, "add_generation_prompt": True}
    texts = [tokenizer.apply_chat_template(conversation, **options) for conversation in conversations]
    return [tokenizer.tokenize(text, add_special_tokens=False) for text in texts]


def with_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """Tokens that begin with BOS.

    Raises:
        ValueError: The tokenizer has none.
    """
    if tokenizer.bos is None:
        raise ValueError("BOS is asked for (add_bos), but the tokenizer has none: leave it out")
    return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def validate_sequence_length(
    args: argparse.Namespace,
    prompts: Sequence[str | Sequence[int]],
    tokenizer: "HFTokenizerAdapter | None" = None,
) -> None:
    """Refuse a command line that asks for more tokens than there is room for.

    Args:
        args: With `max_sequence_length` and `num_tokens_to_generate`.
        prompts: Texts, or token ids.
        tokenizer: Makes tokens of texts; needed if there are texts.

    Raises:
        ValueError: Names the prompt, its length, and the limit.
    """
    number, most = args.num_tokens_to_generate, args.max_sequence_length
    if number >= most:
        raise ValueError(
            f"--num-tokens-to-generate {number} leaves no room for a prompt: expected less than "
            f"--max-sequence-length {most}"
        )
    check_lengths([len(_ids(prompt, tokenizer)) for prompt in prompts], [number] * len(prompts), most)


def check_lengths(lengths: Sequence[int], new_tokens: Sequence[int], most: int) -> None:
    """Refuse prompts that leave no room for what shall follow them.

    Args:
        lengths: Tokens of each prompt.
        new_tokens: Of each prompt.
        most: Tokens of a prompt and its continuation.

    Raises:
        ValueError: Names the first prompt.
    """
    for index, (length, number) in enumerate(zip(lengths, new_tokens, strict=True)):
        if length + number > most:
            raise ValueError(
                f"prompt {index} has {length} tokens, and {number} new ones make {length + number}: the limit is "
                f"max_sequence_length={most}; raise it, shorten the prompt, or generate fewer"
            )


def _ids(prompt: str | Sequence[int], tokenizer: "HFTokenizerAdapter | None") -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError("the length of a text is counted in tokens: pass the tokenizer")
    return tokenizer.tokenize(prompt)
