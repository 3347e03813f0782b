# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face tokenizer under the names that Core's inference engines ask for."""

import argparse
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class HFTokenizerAdapter:
    """A tokenizer for Core's text generation controllers, and for the engine here.

    Args:
        tokenizer: transformers' tokenizer.
        end_ids: Tokens that end a text; None: the tokenizer's EOS.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] | None = None) -> None:
        eos = tokenizer.eos_token_id
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids) if end_ids is not None else () if eos is None else (eos,)

    @property
    def name(self) -> str:
        """Where it was loaded from."""
        return str(self.tokenizer.name_or_path)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.tokenizer)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def bos(self) -> int | None:
        """Id of the begin-of-sequence token, or None."""
        return self.tokenizer.bos_token_id

    @property
    def eod(self) -> int:
        """Id of the token that ends a text.

        Raises:
            ValueError: There is none.
        """
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if not self.end_ids:
            raise ValueError(f"tokenizer {self.name} has no EOS token: set eos_token in its tokenizer_config.json")
        return self.end_ids[0]

    @property
    def pad(self) -> int:
        """Id that fills rows up: the pad token, or else the one that ends a text."""
        return self.eod if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    bos_id = bos_token_id = bos
    eos = eos_id = eos_token_id = eod
    pad_id = pad_token_id = pad

    @functools.cached_property
    def puts_bos(self) -> bool:
        """Whether it puts BOS before a text."""
        return self.bos is not None and self.tokenize("a")[:1] == [self.bos]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, as transformers makes them, with the BOS that some tokenizers put before it."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def detokenize(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of tokens.

        Args:
            ids: A list, or a tensor [S].
            skip_special_tokens: Leave out BOS, EOS and the like.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where in the text each token begins. A token inside of a character begins where the character does."""
        starts = []
        for count in range(len(ids)):
            before = self.detokenize(ids[:count])
            starts.append(min(len(before.rstrip("\ufffd")) if count else 0, len(text)))
        return starts

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """A conversation as transformers renders it: tokens, or with `tokenize=False` text.

        Raises:
            ValueError: The tokenizer has no chat template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(f"tokenizer {self.name} has no chat template")
        try:
            return self.tokenizer.apply_chat_template(conversation, **options)
        except Exception as error:  # a template is a program, in a sandbox that keeps it from the system
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the chat template refuses the conversation: {reason}") from error


def build_tokenizer(
    source: argparse.Namespace | str | Path, hf_model_path: str | Path | None = None, **load_options: Any
) -> HFTokenizerAdapter:
    """The tokenizer of a model, with the tokens that end a text.

    Args:
        source: A command line with the options of `add_model_loading_args`: the tokenizer that was saved with its
            Megatron checkpoint, or else that of its Hugging Face model. Or the directory or hub name of a model.
        hf_model_path: The Hugging Face model, where the command line doesn't name it.
        load_options: As for `AutoBridge.from_hf_pretrained`.

    Raises:
        FileNotFoundError: There is no such model, or no tokenizer.
        ValueError: The tokenizer can't be loaded, or an option isn't known.
    """
    from megatron.bridge.data.config import TokenizerConfig
    from megatron.bridge.data.tokenizer import HuggingFaceTokenizer
    from megatron.bridge.data.tokenizer import build_tokenizer as load_tokenizer
    from megatron.bridge.inference.loading import named_models, resolve_hf_model_path
    from megatron.bridge.models.conversion.generation_config import end_ids, not_applied
    from megatron.bridge.models.conversion.load_options import read_load_options
    from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles, has_tokenizer
    from megatron.bridge.utils.hf_hub import find_hf_directory

    checkpoint: str | Path | None = None
    model: str | Path | None
    if isinstance(source, str | Path):
        model = source
    else:
        model, checkpoint = named_models(source)
        model = model or hf_model_path
        if checkpoint is None and model is None:
            model = resolve_hf_model_path(source)
    options = read_load_options(load_options)
    directory = None if model is None else find_hf_directory(model, with_weights=False, **options.download)
    files = TokenizerFiles.of(directory, checkpoint=checkpoint)
    if files.tokenizer is None or not has_tokenizer(files.tokenizer):
        raise FileNotFoundError(
            f"{checkpoint or model} holds no tokenizer: pass --hf-model-path with the model's directory"
        )
    loaded = load_tokenizer(TokenizerConfig(tokenizer_model=str(files.tokenizer)))
    assert isinstance(loaded, HuggingFaceTokenizer)
    settings = ", ".join(f"{name}={value!r}" for name, value in not_applied(files.generation or {}).items())
    if settings:
        logger.warning(
            "generation_config.json says %s, which transformers' generate applies and the engine here doesn't: the "
            "text may be another",
            settings,
        )
    ends = end_ids(files.generation or {})
    return HFTokenizerAdapter(loaded.hf_tokenizer, ends or None)
