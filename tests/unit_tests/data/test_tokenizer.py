# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from megatron.bridge.data.config import TokenizerConfig
from megatron.bridge.data.tokenizer import NullTokenizer, build_tokenizer, check_tokenizer_fits
from tests.rigs.hub import COMMIT, put_into_cache, use_hub
from tests.unit_tests.data.conftest import write_tokenizer


def test_text_survives_a_round_trip_and_no_special_token_is_added(tokenizer):
    text = "the cat, é and 😀\n"
    ids = tokenizer.text_to_ids(text)
    assert tokenizer.ids_to_text(ids) == text
    assert not set(ids) & tokenizer.special_ids


def test_offsets_say_which_characters_a_token_stands_for(tokenizer):
    text = "the cat"
    [(ids, offsets)] = tokenizer.encode_batch([text])
    assert ids == tokenizer.text_to_ids(text)
    assert "".join(text[start:end] for start, end in offsets) == text


def test_core_names(tokenizer):
    assert tokenizer.eod == tokenizer.eos_id == tokenizer.pad == tokenizer.pad_id
    assert tokenizer.ids_to_text([tokenizer.eos_id]) == "<|im_end|>"
    assert tokenizer.max_token_id == tokenizer.vocab_size - 1


def test_chat_template_of_the_configuration_replaces_the_tokenizers(tokenizer_directory):
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    config = TokenizerConfig(tokenizer_model=str(tokenizer_directory), chat_template=template)
    assert build_tokenizer(config).apply_chat_template([{"role": "user", "content": "hi"}]) == "[hi]"


def test_a_tokenizer_without_template_refuses_conversations(tmp_path):
    directory = write_tokenizer(tmp_path, chat_template=None)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(directory)))
    with pytest.raises(ValueError, match=r"no chat template: set tokenizer\.chat_template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_saved_files_load_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    again = build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "saved")))
    messages = [{"role": "user", "content": "the dog"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert again.text_to_ids("the dog") == tokenizer.text_to_ids("the dog")


def test_a_missing_directory_is_named_and_not_looked_up_on_a_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer_model='.*nowhere' is no directory: expected"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "nowhere")))


def test_broken_files_give_one_line(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_too_small_is_refused(tokenizer):
    check_tokenizer_fits(tokenizer, tokenizer.vocab_size)
    with pytest.raises(ValueError, match=r"ids up to \d+, but the model's vocabulary has \d+ entries"):
        check_tokenizer_fits(tokenizer, tokenizer.vocab_size - 1)


def test_null_tokenizer_reads_numbers():
    tokenizer = NullTokenizer(10)
    assert tokenizer.text_to_ids("3 9  3") == [3, 9, 3]
    assert tokenizer.encode_batch([" 3 33"[:4]])[0] == ([3, 3], [(1, 2), (3, 4)])
    assert tokenizer.ids_to_text([3, 9]) == "3 9"
    with pytest.raises(ValueError, match="'10' is not a token"):
        tokenizer.text_to_ids("1 10")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(), "tokenizer.tokenizer_model is not set"),
        (TokenizerConfig(tokenizer_type="NullTokenizer"), "tokenizer.vocab_size is not set"),
        (TokenizerConfig(tokenizer_type="SentencePiece"), "tokenizer_type='SentencePiece' is not supported"),
    ],
)
def test_incomplete_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(config)


def test_a_chat_template_may_be_a_files_path(tokenizer_directory, tmp_path):
    (tmp_path / "my.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    config = TokenizerConfig(tokenizer_model=str(tokenizer_directory), chat_template=str(tmp_path / "my.jinja"))
    assert build_tokenizer(config).apply_chat_template([{"role": "user", "content": "hi"}]) == "[hi]"
    config.chat_template = str(tmp_path / "gone.jinja")
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template='.*gone\.jinja' is a path in place of a template"):
        build_tokenizer(config)
    directory = write_tokenizer(tmp_path / "path", chat_template=str(tmp_path / "my.jinja"))
    with pytest.raises(ValueError, match="the chat_template of tokenizer.tokenizer_model=.* is a path in place"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(directory)))


@pytest.mark.parametrize("said", [False, None])
def test_code_that_is_not_trusted_is_what_there_is(tokenizer_directory, said):
    options = {"trust_remote_code": said}
    assert build_tokenizer(TokenizerConfig(tokenizer_model=str(tokenizer_directory), hf_tokenizer_kwargs=options))


def test_code_that_is_trusted_is_not_run_where_it_is_not_needed(tmp_path, caplog):
    directory = write_tokenizer(tmp_path)
    path = directory / "tokenizer_config.json"
    mapped = {"auto_map": {"AutoTokenizer": [None, "evil.Fast"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **mapped}))
    (directory / "evil.py").write_text("1 / 0")
    options = {"trust_remote_code": True}
    assert build_tokenizer(TokenizerConfig(tokenizer_model=str(directory), hf_tokenizer_kwargs=options))
    assert "has code of its own, 'evil.Fast', which is never run" in caplog.text


def test_a_name_on_the_hub(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_hub(monkeypatch, tmp_path / "hub")
    put_into_cache(tmp_path / "hub", "some-org/Tiny-1B", write_tokenizer(tmp_path / "source"))
    options = {"revision": COMMIT}
    found = build_tokenizer(TokenizerConfig(tokenizer_model="some-org/Tiny-1B", hf_tokenizer_kwargs=options))
    assert found.name == "some-org/Tiny-1B" and found.text_to_ids("the dog") == tokenizer.text_to_ids("the dog")
    with pytest.raises(FileNotFoundError, match="tokenizer.tokenizer_model='some-org/No' is no directory, and the hub"):
        build_tokenizer(TokenizerConfig(tokenizer_model="some-org/No", hf_tokenizer_kwargs=options))
