# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face model by its public names, and the options that are passed along with a model's name."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained import PreTrainedCausalLM
from megatron.bridge.models.hf_pretrained.utils import is_safe_repo
from tests.rigs.hub import running_hub, use_hub

from ..tiny_llama import SMALL, hf_logits, save_tiny_llama, some_tokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = save_tiny_llama(tmp_path_factory.mktemp("hf") / "tiny", num_hidden_layers=1)
    (directory / "LICENSE").write_text("free\n")
    return directory


@pytest.mark.parametrize(
    ("path", "said", "is_safe"),
    [
        ("Qwen/Qwen3-0.6B", None, True),
        ("Qwen/Qwen3-0.6B", False, False),
        ("nobody/model", None, False),
        ("nobody/model", True, True),
        ("./Qwen", None, False),
    ],
)
def test_whose_code_scripts_run(path, said, is_safe):
    assert is_safe_repo(hf_path=path, trust_remote_code=said) is is_safe


def test_a_directory_is_nobodys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nvidia" / "mine").mkdir(parents=True)
    assert is_safe_repo("nvidia/mine") is False


def test_parts_of_a_model_are_loaded_when_they_are_used(directory):
    found = PreTrainedCausalLM.from_pretrained(directory)
    assert not found.has_model and "not loaded" in repr(found)
    assert found.config.num_hidden_layers == 1 and found.dtype is torch.float32
    assert found.generation_config.eos_token_id == 2
    weights = load_file(directory / "model.safetensors")
    assert set(found.state) == set(weights) and len(found.state) == len(weights)
    assert torch.equal(found.state["model.norm.weight"], weights["model.norm.weight"])
    assert "nothing" not in found.state
    assert found.num_parameters == sum(weight.numel() for weight in weights.values())
    assert not found.has_model
    tokens = some_tokens(SMALL["vocab_size"], 8)
    assert torch.equal(found(input_ids=tokens).logits, hf_logits(directory, tokens))
    assert found.has_model
    assert found.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 10)


def test_artifacts_are_all_but_the_weights(directory, tmp_path):
    PreTrainedCausalLM(directory).save_artifacts(tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"config.json", "LICENSE"} <= names and not any(name.endswith(".safetensors") for name in names)


def test_a_saved_model_is_read_again(directory, tmp_path):
    PreTrainedCausalLM(directory, dtype=torch.bfloat16).save_pretrained(tmp_path)
    again = PreTrainedCausalLM(tmp_path)
    assert again.dtype is torch.bfloat16
    original = load_file(directory / "model.safetensors")["model.norm.weight"]
    assert torch.equal(again.state["model.norm.weight"], original.bfloat16())


@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_bridge_takes_the_dtype_that_is_asked_for(directory, option, dtype):
    bridge = AutoBridge.from_hf_pretrained(directory, **{option: dtype}, device_map="cpu", trust_remote_code=None)
    provider = bridge.to_megatron_provider(load_weights=False)
    assert provider.params_dtype is torch.bfloat16 and provider.bf16
    assert bridge.hf_pretrained.dtype is torch.bfloat16
    assert bridge.hf_pretrained.config.dtype is torch.bfloat16


def test_no_dtype_is_the_files_own(directory):
    bridge = AutoBridge.from_hf_pretrained(directory, torch_dtype="auto")
    assert bridge.to_megatron_provider(load_weights=False).params_dtype is torch.float32


def test_a_bridge_from_a_configuration_has_that(directory):
    config = AutoBridge.from_hf_config(json.loads((directory / "config.json").read_text())).hf_pretrained
    assert type(config).__name__ == "LlamaConfig" and config.hidden_size == SMALL["hidden_size"]


def test_options_that_are_not_known_are_refused(directory):
    for make in (AutoBridge.from_hf_pretrained, AutoBridge.can_handle, PreTrainedCausalLM):
        with pytest.raises(ValueError, match="option revison='x' is unknown"):
            make(directory, revison="x")
    with pytest.raises(ValueError, match="dtype='float8' is not supported"):
        AutoBridge.from_hf_pretrained(directory, dtype="float8")


def test_code_of_the_directory_is_never_run_and_that_is_said(directory, tmp_path, caplog):
    content = json.loads((directory / "config.json").read_text())
    with caplog.at_level(logging.WARNING):
        AutoBridge.from_hf_pretrained(directory, trust_remote_code=True)
    assert "code of its own" not in caplog.text, "there is none"
    (tmp_path / "config.json").write_text(json.dumps({**content, "auto_map": {"AutoConfig": "configuration.Mine"}}))
    (tmp_path / "configuration.py").write_text("raise SystemExit('it ran')")
    logging.getLogger("megatron.bridge").addHandler(caplog.handler)
    try:
        AutoBridge.from_hf_pretrained(tmp_path, trust_remote_code=True)
    finally:
        logging.getLogger("megatron.bridge").removeHandler(caplog.handler)
    assert "has code of its own, which is never run here" in caplog.text


def test_weights_of_the_hub_are_fetched_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = save_tiny_llama(tmp_path / "source")
    with running_hub() as hub:
        use_hub(monkeypatch, tmp_path / "hub", hub.url)
        hub.put("some-org/Tiny-1B", directory)
        bridge = AutoBridge.from_hf_pretrained("some-org/Tiny-1B")
        assert AutoBridge.can_handle("some-org/Tiny-1B")
        assert bridge.to_megatron_provider(load_weights=False).hf_model_id == "some-org/Tiny-1B"
        assert "model.safetensors" not in hub.fetched()
        pretrained = bridge.hf_pretrained
        assert pretrained.num_parameters == PreTrainedCausalLM(directory).num_parameters
        assert hub.fetched().count("model.safetensors") == 1
        bridge.to_megatron_provider()
        assert hub.fetched().count("model.safetensors") == 1
