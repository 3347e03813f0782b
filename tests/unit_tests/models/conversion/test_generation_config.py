# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Where a text ends: read as transformers reads it, with what was learned added, and refused where it is damaged."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megatron.bridge.checkpoint import iterations
from megatron.bridge.models.conversion import generation_config as module
from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles, find_generation_config
from tests.unit_tests.data.conftest import CHATML, write_tokenizer

END, BEGIN = 279, 280  # <|im_end|>, <|begin|>


def write_model(directory, config=None, generation=None):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **(config or {})}))
    if generation is not None:
        (directory / module.FILE).write_text(json.dumps(generation))
    return directory


def of_transformers(directory):
    """As `from_pretrained` of a model does it."""
    try:
        return GenerationConfig.from_pretrained(directory)
    except OSError:
        return GenerationConfig.from_pretrained(directory, config_file_name="config.json", _from_model_config=True)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 4}, {"eos_token_id": [4, 7]}, (4, 7)),
        ({"eos_token_id": [4, 7]}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": [4, 7]}, None, (4, 7)),
        ({"eos_token_id": 4}, {"bos_token_id": 1}, ()),
        ({"eos_token_id": 4}, {"eos_token_id": None}, ()),
        ({"eos_token_id": None}, None, ()),
        ({}, None, ()),
        ({"repetition_penalty": 1.5, "eos_token_id": 3}, None, (3,)),
    ],
)
def test_the_end_tokens_are_those_that_transformers_takes(tmp_path, config, generation, expected):
    directory = write_model(tmp_path, config, generation)
    found, theirs = module.generation_config_of_model(directory), of_transformers(directory)
    assert module.end_ids(found) == expected == module.end_ids({"eos_token_id": theirs.eos_token_id})
    assert module.not_applied(found).get("repetition_penalty") == theirs.repetition_penalty
    (tmp_path / "copy").mkdir()
    module.write_generation_config(tmp_path / "copy", found)
    written = GenerationConfig.from_pretrained(tmp_path / "copy")
    assert written.eos_token_id == theirs.eos_token_id and written.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list: expected a JSON object"),
        ('{"eos_token_id": "4"}', "eos_token_id='4': expected a token's id, a list of them, or null"),
        ('{"eos_token_id": [4, true]}', "eos_token_id="),
        ('{"eos_token_id": 4.0}', "eos_token_id=4.0"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, content, message):
    (write_model(tmp_path) / module.FILE).write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json") as error:
        module.generation_config_of_model(tmp_path)
    assert message in str(error.value)


def test_ids_are_added_behind_those_that_are_there():
    content = {"eos_token_id": 4, "temperature": 0.7}
    assert module.with_end_ids(content, (4,)) == content
    assert module.with_end_ids(content, (4, 9, 9)) == {"eos_token_id": [4, 9], "temperature": 0.7}
    assert module.with_end_ids({}, (9,)) == {"eos_token_id": [9]}


def test_settings_that_greedy_tokens_depend_on_are_told_from_the_others():
    content = {"temperature": 0.7, "do_sample": True, "repetition_penalty": 1.0, "num_beams": 4, "bad_words_ids": None}
    assert module.not_applied(content) == {"num_beams": 4}


NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}"


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (None, (BEGIN,)),
        (CHATML, (BEGIN, END)),
        (CHATML.replace("<|im_end|>", " <|im_end|>"), (BEGIN, END)),
        (NEEDS_SYSTEM + CHATML, (BEGIN, END)),
        (NO_END, (BEGIN,)),
        (NO_END + "<|begin|>", (BEGIN,)),
        ("{{ raise_exception('never') }}", (BEGIN,)),
    ],
)
def test_what_was_learned_is_eos_and_the_end_of_a_turn(learned, template, ends):
    learned.eos_token, learned.chat_template = "<|begin|>", template
    assert module.learned_end_ids(learned) == ends


@pytest.fixture
def checkpoint(tmp_path):
    """An iteration that names its model, as far as its text is concerned."""
    model = write_model(tmp_path / "model", {"eos_token_id": 5})
    write_tokenizer(model, chat_template=None)
    directory = tmp_path / "ckpt" / "iter_0000003"
    directory.mkdir(parents=True)
    for name, content in (
        (iterations.METADATA_FILE, '{"sharded_backend": "torch_dist"}'),
        (iterations.DCP_METADATA_FILE, ""),
        ("__0_0.distcp", ""),
        (iterations.TRAIN_STATE_FILE, ""),
        (iterations.CONFIG_FILE, f"model: {{hf_model_id: {model}}}"),
    ):
        (directory / name).write_text(content)
    return directory


def test_what_a_checkpoint_lacks_is_taken_from_its_model(checkpoint):
    model, own = checkpoint.parents[1] / "model", checkpoint / iterations.TOKENIZER_DIRECTORY
    assert TokenizerFiles.of_checkpoint(checkpoint) == TokenizerFiles(model, {"eos_token_id": [5, END]})
    own.mkdir()  # as a run without a tokenizer leaves it
    assert TokenizerFiles.of_checkpoint(checkpoint).tokenizer == model
    write_tokenizer(own)
    assert TokenizerFiles.of_checkpoint(checkpoint) == TokenizerFiles(own, {"eos_token_id": [5, END]})
    (own / module.FILE).write_text('{"eos_token_id": 7}')
    assert TokenizerFiles.of_checkpoint(checkpoint) == TokenizerFiles(own, {"eos_token_id": 7})
    assert find_generation_config(checkpoint) == {"eos_token_id": 7}
    (own / module.FILE).unlink()
    assert find_generation_config(checkpoint) == {"eos_token_id": 5}
    model.rename(model.with_name("moved"))
    assert TokenizerFiles.of_checkpoint(checkpoint) == TokenizerFiles(own, {"eos_token_id": [END]})
    assert find_generation_config(checkpoint) is None


def test_an_import_of_before_has_the_end_tokens_of_its_model(checkpoint):
    (checkpoint / iterations.TRAIN_STATE_FILE).unlink()
    write_tokenizer(checkpoint / iterations.TOKENIZER_DIRECTORY)
    assert TokenizerFiles.of_checkpoint(checkpoint).generation == {"eos_token_id": 5}


def test_an_export_has_no_file_of_another_tokenizer(checkpoint, tmp_path):
    model, own = checkpoint.parents[1] / "model", checkpoint / iterations.TOKENIZER_DIRECTORY
    (model / "tokenizer.model").write_text("another")
    write_tokenizer(own)
    (tmp_path / "out").mkdir()
    TokenizerFiles.of(model, checkpoint=checkpoint).write(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", module.FILE}
