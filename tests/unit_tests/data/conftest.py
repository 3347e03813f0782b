# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A real tokenizer, small enough to train in a test: byte-level BPE with ChatML and pad == eos, as SmolLM2 has.

And rows to read with it.
"""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron.bridge.data.config import TokenizerConfig
from megatron.bridge.data.tokenizer import HuggingFaceTokenizer, build_tokenizer
from tests.unit_tests.data.hf_data import ROWS

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>"]
# The generation block is invisible in the text; transformers uses it to tell the assistant's tokens.
MARKED_CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = MARKED_CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def write_tokenizer(directory: Path, *, chat_template: str | None = CHATML, adds_bos: bool = False) -> Path:
    """Trains the tokenizer on a few words and writes it into `directory`; it has BOS, and may put it before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran to the cat"] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if adds_bos:
        bos = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[bos])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory) -> HuggingFaceTokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_directory)))


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows (objects, or raw strings) to a JSONL file and returns its path."""

    def write(rows: list, name: str = "training.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def squad(tmp_path):
    """A local copy of SQuAD as JSON lines: its directory."""
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "squad").mkdir(exist_ok=True)
        (tmp_path / "squad" / f"{split}.jsonl").write_text(lines)
    return tmp_path / "squad"
