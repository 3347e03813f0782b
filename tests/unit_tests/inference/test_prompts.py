# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Prompts from the command line and from files, their tokens, and the room for what follows."""

import json
from argparse import Namespace

import pytest

from megatron.bridge.inference.prompts import encode_prompts, load_prompts, validate_sequence_length
from megatron.bridge.inference.tokenizer import HFTokenizerAdapter
from tests.unit_tests.data.conftest import tokenizer, tokenizer_directory  # noqa: F401  # fixtures


def of_file(path, *, prompts=None, limit=None):
    return load_prompts(Namespace(prompts=prompts, prompt_file=str(path), prompt_file_num_truncate=limit))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n two \r\nthree", ["one", " two ", "three"]),
        ("a.jsonl", '{"prompt": "one"}\n\n"two"\n{"text": "a\u2028b"}\n{"input": "four", "x": 1}\n', None),
        ("a.json", '["one", {"prompt": "two"}]', ["one", "two"]),
    ],
)
def test_a_file_gives_its_prompts(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    expected = expected or ["one", "two", "a\u2028b", "four"]
    assert of_file(tmp_path / name) == expected
    assert of_file(tmp_path / name, limit=1) == expected[:1]
    assert of_file(tmp_path / name, prompts=["first"]) == ["first", *expected]


def test_the_command_line_gives_prompts():
    assert load_prompts(Namespace(prompts=["a", "b"], prompt_file=None)) == ["a", "b"]
    assert load_prompts(Namespace(prompts="a", prompt_file=None)) == ["a"]
    with pytest.raises(ValueError, match="there are no prompts: pass --prompts"):
        load_prompts(Namespace(prompts=None, prompt_file=None))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"one"\n{"prompt": 3}\n', "a.jsonl:2 holds no prompt"),
        ("a.jsonl", b'"one"\n{"prompt": \n', "a.jsonl:2 is not valid JSON"),
        ("a.json", b'{"prompt": "one"}', "a.json holds a dict: expected a list"),
        ("a.json", b'["one", {"question": "two"}]', "a.json, entry 2 holds no prompt"),
        ("a.txt", b"\xff", "a.txt is not UTF-8"),
        ("a.txt", b"\n", "there are no prompts"),
    ],
)
def test_other_content_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        of_file(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt is not there"):
        of_file(tmp_path / "none.txt")


@pytest.fixture
def adapter(tokenizer):  # noqa: F811
    return HFTokenizerAdapter(tokenizer.hf_tokenizer)


def test_prompts_become_tokens(adapter, tokenizer):  # noqa: F811
    ids = tokenizer.text_to_ids
    assert encode_prompts(["the cat", "dog"], adapter) == [ids("the cat"), ids("dog")]
    assert encode_prompts(["dog"], adapter, add_bos=True) == [[tokenizer.bos_id, *ids("dog")]]
    (chat,) = encode_prompts(["dog"], adapter, chat=True, system="sat")
    assert chat == ids("<|im_start|>system\nsat<|im_end|>\n<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\n")
    for options, message in (({"system": "x"}, "add --chat"), ({"chat": True, "add_bos": True}, "leave it out")):
        with pytest.raises(ValueError, match=message):
            encode_prompts(["dog"], adapter, **options)


def test_sequences_that_are_too_long_are_refused(adapter):
    room = Namespace(num_tokens_to_generate=4, max_sequence_length=8)
    validate_sequence_length(room, ["the cat", [1, 2, 3, 4]], adapter)
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens, and 4 new ones make 9: the limit is"):
        validate_sequence_length(room, ["the cat", [1, 2, 3, 4, 5]], adapter)
    with pytest.raises(ValueError, match="pass the tokenizer"):
        validate_sequence_length(room, ["the cat"])
    with pytest.raises(ValueError, match="4 leaves no room for a prompt"):
        validate_sequence_length(Namespace(num_tokens_to_generate=4, max_sequence_length=4), [])


def test_jsonl_rows_are_what_json_writes(tmp_path):
    texts = ["a\nb", 'quote "x"', "ü\u0085"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    assert of_file(tmp_path / "a.jsonl") == texts
