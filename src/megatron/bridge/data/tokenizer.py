# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers: a thin layer over Hugging Face's that also answers by Megatron-Core's names."""

import copy
import functools
import hashlib
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron.bridge.data.config import TokenizerConfig
from megatron.bridge.data.hf_tokenizer import load_hf_tokenizer

logger = logging.getLogger(__name__)

Offsets = list[tuple[int, int]]

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class HuggingFaceTokenizer:
    """A fast Hugging Face tokenizer; special tokens are only what a text or a template spells out."""

    def __init__(self, hf_tokenizer: Any, name: str) -> None:
        """Wraps `hf_tokenizer` (a `PreTrainedTokenizerFast`); `name` is used in messages and cache keys."""
        self.hf_tokenizer = hf_tokenizer
        self.name = name
        self.template_kwargs: dict[str, Any] = {}

    def with_chat_template(
        self, template: str | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> "HuggingFaceTokenizer":
        """The same tokens with another chat template, or with more that the template is given.

        Args:
            template: Jinja text, or the path of a file that holds it. None: the same.
            template_kwargs: Arguments beside messages and tools, such as `enable_thinking`.

        Raises:
            ValueError: The template is the path of a file that can't be read.
        """
        hf_tokenizer = self.hf_tokenizer
        if template is not None:
            hf_tokenizer = copy.copy(hf_tokenizer)
            hf_tokenizer.chat_template = _template_text(template, "dataset.preprocessing.chat_template")
        changed = HuggingFaceTokenizer(hf_tokenizer, self.name)
        changed.template_kwargs = self.template_kwargs | (template_kwargs or {})
        return changed

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.hf_tokenizer)

    @property
    def max_token_id(self) -> int:
        """The largest id the tokenizer can give; larger than `vocab_size` - 1 where ids have gaps."""
        return max(self.hf_tokenizer.get_vocab().values())

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-sequence token, or None."""
        return self.hf_tokenizer.bos_token_id

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token, or None."""
        return self.hf_tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id that fills rows up: the pad token, else EOS, else 0. Padding is masked by length, never by id."""
        candidates = (self.hf_tokenizer.pad_token_id, self.eos_id)
        return next((token for token in candidates if token is not None), 0)

    @property
    def eod(self) -> int:
        """Core's name for the id that ends a document."""
        if self.eos_id is None:
            raise ValueError(f"tokenizer {self.name} has no EOS token: set eos_token in its tokenizer_config.json")
        return self.eos_id

    @property
    def pad(self) -> int:
        """Core's name for `pad_id`."""
        return self.pad_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        added = self.hf_tokenizer.added_tokens_decoder
        return frozenset(self.hf_tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens as text."""
        return tuple(self.hf_tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))

    @property
    def eos_text(self) -> str | None:
        """The end-of-sequence token as text, or None."""
        return self.hf_tokenizer.eos_token

    @property
    def special_tokens_dict(self) -> dict[str, int | None]:
        """Core's view of the special tokens: role -> id."""
        return {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}

    @property
    def unique_identifiers(self) -> OrderedDict:
        """What Core's index caches are keyed by."""
        return OrderedDict({"class": type(self).__name__, "tokenizer_path": self.name})

    @property
    def fingerprint(self) -> str:
        """A hash of all that tokens depend on: vocabulary and rules, special tokens, chat template, library."""
        import transformers  # late, as below

        parts = [
            self.hf_tokenizer.backend_tokenizer.to_str(),
            self.hf_tokenizer.chat_template,
            self.special_tokens_dict,
            sorted(self.special_ids),
            tokenizers.__version__,
            transformers.__version__,  # whose rendering changes in detail
            *([self.template_kwargs] if self.template_kwargs else []),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.hf_tokenizer.chat_template)

    def text_to_ids(self, text: str) -> list[int]:
        """Returns the tokens of `text`; no special token is added."""
        return self.hf_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    tokenize = text_to_ids

    def prompt_to_ids(self, text: str) -> list[int]:
        """Returns the tokens of `text` as transformers makes them, with the BOS that some tokenizers put before it."""
        return self.hf_tokenizer(text, verbose=False)["input_ids"]

    @property
    def puts_bos(self) -> bool:
        """Whether transformers puts BOS before a text."""
        return self.bos_id is not None and self.prompt_to_ids("a")[:1] == [self.bos_id]

    def ids_to_text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of `ids`."""
        return self.hf_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    detokenize = ids_to_text

    def encode_batch(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """Returns for each text its tokens and the (start, end) characters each token stands for."""
        # The library below transformers, which would turn each text into a dictionary of lists, and those into others.
        backend = self.hf_tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [(one.ids, one.offsets) for one in backend.encode_batch(texts, add_special_tokens=False)]

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, tools: list | None = None
    ) -> str:
        """Returns the conversation as the text the model was trained on.

        Raises:
            ValueError: The tokenizer has no chat template, or it refuses the conversation.
        """
        return self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt, tools=tools)

    def marks_answers(self, tools: list | None = None) -> bool:
        """Whether the chat template says by `{% generation %}` marks what the assistant wrote."""
        return GENERATION_MARK.search(self.hf_tokenizer.get_chat_template(tools=tools)) is not None

    def heeds_generation_prompt(self, tools: list | None = None) -> bool:
        """Whether the chat template looks at whether a generation prompt is asked for."""
        return "add_generation_prompt" in self.hf_tokenizer.get_chat_template(tools=tools)

    def apply_marked_chat_template(
        self, messages: list[dict[str, Any]], *, tools: list | None = None
    ) -> tuple[list[int], Offsets, list[int]]:
        """Returns the conversation's tokens, the characters each stands for, and 1 for those that the marks hold.

        Raises:
            ValueError: The tokenizer has no chat template, or it refuses the conversation.
        """
        made = self._apply(
            messages,
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        return made["input_ids"], made["offset_mapping"], made["assistant_masks"]

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        if not self.has_chat_template:
            raise ValueError(f"tokenizer {self.name} has no chat template: set tokenizer.chat_template")
        try:
            return self.hf_tokenizer.apply_chat_template(messages, **self.template_kwargs, **options)
        except Exception as error:  # a template is a program, in a sandbox that keeps it from the system
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the chat template refuses the conversation: {reason}") from error

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into `directory`."""
        self.hf_tokenizer.save_pretrained(str(directory))


class NullTokenizer:
    """A tokenizer of numbers: "7 42" is the tokens 7 and 42; the last id of the vocabulary is EOS and padding."""

    name = "NullTokenizer"
    bos_id = None
    puts_bos = False
    eos_text = None
    special_texts = ()
    has_chat_template = False

    def __init__(self, vocab_size: int) -> None:
        """Makes ids 0 .. `vocab_size` - 1."""
        self.vocab_size = vocab_size
        self.max_token_id = self.eos_id = self.pad_id = self.eod = vocab_size - 1
        self.special_ids = frozenset({self.eod})
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "vocab_size": vocab_size})
        self.fingerprint = f"NullTokenizer({vocab_size})"

    @property
    def pad(self) -> int:
        """Not defined, so that Core never masks a token for looking like padding."""
        raise NotImplementedError("NullTokenizer has no padding token of its own")

    def text_to_ids(self, text: str) -> list[int]:
        """Returns the numbers in `text`.

        Raises:
            ValueError: A word is not a number of the vocabulary.
        """
        return self.encode_batch([text])[0][0]

    tokenize = text_to_ids

    def ids_to_text(self, ids: Sequence[int]) -> str:
        """Returns the numbers as text."""
        return " ".join(str(token) for token in ids)

    detokenize = ids_to_text

    def encode_batch(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """Returns for each text its tokens and the (start, end) characters each token stands for."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        end = 0
        for word in text.split():
            start = text.index(word, end)
            end = start + len(word)
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise ValueError(f"{word!r} is not a token: NullTokenizer expects 0 to {self.vocab_size - 1}")
            ids.append(int(word))
            offsets.append((start, end))
        return ids, offsets

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        """Raises ValueError: numbers have no chat template."""
        raise ValueError("NullTokenizer has no chat template: use tokenizer_type=HuggingFaceTokenizer")

    def save_pretrained(self, directory: str | Path) -> None:
        """Makes `directory`; there is nothing to write."""
        Path(directory).mkdir(parents=True, exist_ok=True)


Tokenizer = HuggingFaceTokenizer | NullTokenizer


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Loads the tokenizer that `config` names.

    Raises:
        FileNotFoundError: The directory does not exist.
        ValueError: The files cannot be loaded, or hold a tokenizer without character offsets.
    """
    config.finalize()
    if config.tokenizer_type == "NullTokenizer":
        assert config.vocab_size is not None  # finalize() refuses it
        return NullTokenizer(config.vocab_size)
    name = str(config.tokenizer_model)
    hf_tokenizer = load_hf_tokenizer(name, dict(config.hf_tokenizer_kwargs))
    if not hf_tokenizer.is_fast:
        kind = type(hf_tokenizer).__name__
        raise ValueError(f"tokenizer.tokenizer_model={name!r} gives a {kind} without offsets: save its fast version")
    if config.chat_template is not None:
        hf_tokenizer.chat_template = _template_text(config.chat_template, "tokenizer.chat_template")
    elif isinstance(hf_tokenizer.chat_template, str):
        _check_template(hf_tokenizer.chat_template, f"the chat_template of tokenizer.tokenizer_model={name!r}")
    return HuggingFaceTokenizer(hf_tokenizer, name)


def _template_text(template: str, option: str) -> str:
    """What an option for a chat template says: itself, or the text of the file that it names."""
    if template.strip() and "{" not in template and "\n" not in template.strip():
        path = Path(template.strip()).expanduser()
        try:
            if path.is_file():
                template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{option}={str(path)!r} can't be read ({error})") from error
    _check_template(template, f"{option}={template!r}")
    return template


def _check_template(template: str, where: str) -> None:
    """Refuses a text that renders nothing of a conversation, such as the path of a file that isn't there."""
    text = template.strip()
    if text and "{" not in text and "\n" not in text and (text.endswith((".jinja", ".jinja2", ".j2")) or "/" in text):
        raise ValueError(f"{where} is a path in place of a template: expected Jinja text, or a file that exists")


def check_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose ids don't all lie in a model's vocabulary.

    Args:
        tokenizer: As made by `build_tokenizer`.
        vocab_size: Rows of the model's embedding, padding rows not counted.

    Raises:
        ValueError: A token has no embedding row.
    """
    if tokenizer.max_token_id >= vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has ids up to {tokenizer.max_token_id}, but the model's vocabulary has "
            f"{vocab_size} entries (0 to {vocab_size - 1}): use the model's own tokenizer (tokenizer.tokenizer_model)"
        )
