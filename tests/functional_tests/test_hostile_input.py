# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Strangers' configurations, models and data: nothing that they hold runs, none leads elsewhere, none becomes huge.

Each payload would make a directory. For each kind a reader that does as it is told shows that it would. Checkpoints
have a file of their own.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import tracemalloc

import jinja2
import numpy as np
import pytest
import torch
import yaml

from megatron.bridge.checkpoint.safe_pickle import read_blob
from megatron.bridge.data.cache import read_cache
from megatron.bridge.data.config import DatasetBuildContext, GPTDatasetConfig, TokenizerConfig
from megatron.bridge.data.gpt import build_gpt_datasets
from megatron.bridge.data.jsonl import read_rows
from megatron.bridge.data.tokenizer import NullTokenizer, build_tokenizer
from megatron.bridge.models.conversion.hf_weights import HFWeights
from megatron.bridge.training.config import ConfigContainer, runtime_config_update
from megatron.bridge.utils.overrides import apply_overrides
from tests.rigs.hostile import DOUBLED, YAML_BOMBS, Payload, repacked, torch_saved, write_hostile_model
from tests.rigs.ranks import run_on_ranks
from tests.rigs.tiny import tiny_config
from tests.unit_tests.data.conftest import write_tokenizer

MOST_BYTES = 64 << 20
"""What reading a hostile configuration may take: the bombs become gigabytes."""

# Configurations: ConfigContainer.from_yaml and overrides on the command line.

TARGETS = ("os.mkdir", "subprocess.run", "builtins.exec", "torch.hub.load", "megatron.bridge.convert.main")
CONFIGS = {
    "python": "model: !!python/object/apply:os.mkdir ['{mark}']",
    **{f"a _target_ {name}": f"model: {{{{_target_: {name}, _args_: ['{{mark}}']}}}}" for name in TARGETS},
    "a partial _target_": "model: {{activation_func: {{_target_: os.mkdir, _partial_: true, _args_: ['{mark}']}}}}",
    "a _target_ that isn't called": "model: {{activation_func: {{_target_: os.mkdir, _call_: false}}}}",
    **{f"a bomb of {name}": text.replace("{", "{{").replace("}", "}}") for name, text in YAML_BOMBS.items()},
    "nested data": "model: " + "{{a: " * 300 + "1" + "}}" * 300,
    "a long number": "train: {{train_iters: " + "1" * 100_000 + "}}",
}


@pytest.mark.any_core
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration(tmp_path, name):
    text = CONFIGS[name].format(mark=tmp_path / "it ran")
    (tmp_path / "config.yaml").write_text(text)
    tracemalloc.start()
    with pytest.raises(ValueError, match="config.yaml: ") as refusal:
        ConfigContainer.from_yaml(tmp_path / "config.yaml")
    section, _, value = text.partition(": ")
    with pytest.raises(ValueError) as refused_override:
        apply_overrides(tiny_config(tmp_path), [f"{section}={value}" if "\n" not in text else f"model={{{text}}}"])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < MOST_BYTES
    for error in (refusal, refused_override):
        assert "\n" not in str(error.value) and len(str(error.value)) < 4000 + 2 * len(text)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "PATH"])
def test_a_configuration_names_no_code_in_the_environment(tmp_path, name):
    cfg = apply_overrides(tiny_config(tmp_path), [f"env_vars.{name}={tmp_path}/evil"])
    with pytest.raises(ValueError, match=f"env_vars.{name} would make processes load other code"):
        runtime_config_update(cfg)
    assert "evil" not in os.environ.get(name, "")


# Hugging Face directories: the tokenizer, weights, and the conversion.


def import_hostile_model(directory):
    from megatron.bridge.convert import main

    return main(["import", "--hf-model", f"{directory}/model", "--megatron-path", f"{directory}/imported"])


def test_a_model_with_code_is_converted_and_its_code_is_left_alone(tmp_path):
    write_hostile_model(tmp_path / "model", tmp_path / "it ran")
    assert run_on_ranks(import_hostile_model, 1, tmp_path) == [0]
    assert not (tmp_path / "it ran").exists()


def test_a_tokenizer_with_code(tmp_path, monkeypatch):
    directory = write_hostile_model(tmp_path / "model", tmp_path / "it ran")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    with pytest.raises(ValueError, match="cannot be loaded .*needs code of its own, 'evil.T', which is never run"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(directory)))
    trusting = TokenizerConfig(tokenizer_model=str(directory), hf_tokenizer_kwargs={"trust_remote_code": True})
    with pytest.raises(ValueError, match="needs code of its own, 'evil.T', which is never run, trusted or not"):
        build_tokenizer(trusting)
    assert not (tmp_path / "it ran").exists()


ESCAPES = (
    "{{{{ cycler.__init__.__globals__.os.mkdir('{mark}') }}}}",
    "{{{{ lipsum.__globals__['os'].mkdir('{mark}') }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ messages.append.__self__.__class__.__base__.__subclasses__() }}}}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template(tmp_path, template):
    write_tokenizer(tmp_path, chat_template=template.format(mark=tmp_path / "it ran"))
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path)))
    with pytest.raises(ValueError, match="the chat template refuses the conversation: (Security|Undefined)Error"):
        tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert not (tmp_path / "it ran").exists()


HEADERS = {
    "petabytes": (1 << 50).to_bytes(8, "little"),
    "a tensor of petabytes": b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
    "a shape that overflows": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header(tmp_path, name):
    header = HEADERS[name]
    content = header if len(header) == 8 else len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is damaged or half-written"):
        HFWeights(tmp_path).files  # noqa: B018


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", ".", "a/b", "", "a\0b", 3])
def test_an_index_leads_nowhere_else(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises((ValueError, FileNotFoundError), match="expected a file in the same directory"):
        HFWeights(tmp_path).files  # noqa: B018


# Data: JSON Lines, the tokens that a cache keeps, Megatron-Core's indexed data and the arrays beside it.


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '"' + "a" * 100_000])
def test_a_line_of_json(tmp_path, line):
    (tmp_path / "training.jsonl").write_text(line)
    with pytest.raises(ValueError, match="training.jsonl:1: not valid JSON") as refusal:
        list(read_rows(tmp_path / "training.jsonl"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["a pickle", "a bomb that inflates", "petabytes"])
def test_tokens_that_someone_else_left(tmp_path, kind):
    about = np.array(json.dumps({"version": 1, "recipe": {}, "report": {}}))
    path = tmp_path / "tokens.npz"
    if kind == "a pickle":
        np.savez(path, about=about, ids=np.array([Payload(tmp_path / "it ran")], dtype=object))
    elif kind == "a bomb that inflates":
        np.savez_compressed(path, about=about, ids=np.zeros(10_000_000, dtype=np.int8))
    else:
        np.savez(path, about=about, ids=np.zeros(10_000, dtype=np.int8))
        path.write_bytes(path.read_bytes().replace(b"(10000,), }       ", b"(99999999999999,),}"[:18]))
    assert read_cache(path, ("ids",), recipe={}) is None
    assert not (tmp_path / "it ran").exists()


def _blend(directory):
    builder_of = importlib.import_module("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder
    builder = builder_of(f"{directory}/data.bin", dtype=np.int32)
    builder.add_document(torch.arange(30), [30])
    builder.finalize(f"{directory}/data.idx")
    return GPTDatasetConfig(random_seed=1, seq_length=8, blend=([f"{directory}/data"], None), split="1,0,0")


def _build(config):
    return build_gpt_datasets(config, DatasetBuildContext(2, 0, 0, tokenizer=NullTokenizer(64)))


def test_arrays_beside_indexed_data(tmp_path):
    config = _blend(tmp_path)
    cached = tmp_path / "data" / "cache" / "GPTDataset_indices" / "0-GPTDataset-train-document_index.npy"
    cached.parent.mkdir(parents=True)
    for content in (pickle.dumps(Payload(tmp_path / "it ran")), b"\x93NUMPY\x01\x00\x76\x00{"):
        cached.write_bytes(content)
        with pytest.raises(ValueError, match=r"document_index.npy is no plain array .*remove it, and it is made again"):
            _build(config)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:20], lambda b: b[:40], lambda b: b"x" + b[1:], lambda b: b[:17] + b"\xff" + b[18:]]
)
def test_an_index_of_megatron_core_is_looked_at_first(tmp_path, spoil):
    config = _blend(tmp_path)
    index = tmp_path / "data.idx"
    index.write_bytes(spoil(index.read_bytes()))
    with pytest.raises(ValueError, match="data.idx is damaged .*expected an index that Megatron-Core wrote"):
        _build(config)


# The payloads are live.


def _pickle_is(mark):
    pickle.loads(pickle.dumps(Payload(mark)))


def _torchs_archive_is(mark):
    torch.load(io.BytesIO(torch_saved(Payload(mark))), weights_only=False)


def _yaml_is(mark):
    yaml.unsafe_load(CONFIGS["python"].format(mark=mark))


def _a_target_is(mark):
    section = yaml.safe_load(CONFIGS["a _target_ os.mkdir"].format(mark=mark))["model"]
    module, _, name = section["_target_"].rpartition(".")
    getattr(importlib.import_module(module), name)(*section["_args_"])


def _a_models_code_is(mark):
    from transformers import AutoTokenizer

    with contextlib.suppress(AttributeError):  # its class is no configuration: too late
        AutoTokenizer.from_pretrained(write_hostile_model(mark.parent / "model", mark), trust_remote_code=True)


def _a_chat_template_is(mark):
    jinja2.Environment().from_string(ESCAPES[0].format(mark=mark)).render()


def _an_array_is(mark):
    np.savez(mark.parent / "tokens.npz", ids=np.array([Payload(mark)], dtype=object))
    np.load(mark.parent / "tokens.npz", allow_pickle=True)["ids"]


NAIVE = (_pickle_is, _torchs_archive_is, _yaml_is, _a_target_is, _a_models_code_is, _a_chat_template_is, _an_array_is)


@pytest.mark.parametrize("run", NAIVE, ids=lambda run: run.__name__)
def test_the_payload_would_run(tmp_path, run, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run(tmp_path / "it ran")
    assert (tmp_path / "it ran").is_dir()


def test_the_bombs_would_go_off():
    """As far as that can be shown: what they would become."""
    lists = pickle.loads(DOUBLED)
    assert lists[0] is lists[1] and len(DOUBLED) < 1000
    with pytest.raises(ValueError, match="2.31e"):
        read_blob(io.BytesIO(repacked(torch_saved({}), data=DOUBLED)), named="bomb")
