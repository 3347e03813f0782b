# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Models of checkpoints outside a run: what is loaded is what was saved."""

import pytest
import torch
import torch.distributed as dist
from megatron.bridge.training.model_load_save import (
    build_and_load_model,
    load_megatron_model,
    load_model_config,
    load_tokenizer,
    save_megatron_model,
    temporary_distributed_context,
)
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.checkpoint.model_checkpoint import save_model_checkpoint
from megatron.bridge.models.conversion import weights_verification_table
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.utils.yaml_io import to_yaml_dict

from ...models.tiny_llama import save_tiny_llama

NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    directory = save_tiny_llama(tmp_path_factory.mktemp("hf") / "tiny", num_hidden_layers=1)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(hf, tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron") / "tiny"
    AutoBridge.import_ckpt(hf, root, show_progress=False)
    return root


def nothing_is_up():
    return not dist.is_initialized() and not parallel_state.is_initialized()


def test_groups_are_there_inside_alone():
    with temporary_distributed_context():
        assert dist.get_world_size() == 1 and parallel_state.is_initialized()
        with temporary_distributed_context():
            pass
        assert dist.is_initialized() and parallel_state.is_initialized(), "the outer one's stay"
    assert nothing_is_up()


def test_groups_are_taken_down_after_an_error():
    with pytest.raises(KeyError), temporary_distributed_context():
        raise KeyError
    assert nothing_is_up()


def test_the_configuration_of_a_checkpoint(checkpoint, hf):
    provider, arguments = load_model_config(checkpoint)
    assert isinstance(provider, GPTModelProvider) and arguments is None
    assert (provider.num_layers, provider.hf_model_id) == (1, str(hf))


def test_the_weights_of_a_checkpoint_are_loaded(checkpoint, hf):
    state = load_megatron_model(checkpoint, return_state_dict=True, use_cpu_init=True)
    norm = load_file(hf / "model.safetensors")["model.norm.weight"]
    assert torch.equal(state[NORM], norm) and nothing_is_up()
    (chunk,) = load_megatron_model(checkpoint)
    assert torch.equal(chunk.state_dict()[NORM], norm) and nothing_is_up()


def test_what_is_saved_is_loaded_again(checkpoint, hf, tmp_path):
    with temporary_distributed_context():
        provider, _ = load_model_config(checkpoint)
        chunks = build_and_load_model(checkpoint, provider, skip_temp_dist_context=True)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.add_(1)
        save_megatron_model(chunks, tmp_path / "new", hf_tokenizer_path=hf, low_memory_save=True)
    before, after = (
        load_megatron_model(path, return_state_dict=True, use_cpu_init=True) for path in (checkpoint, tmp_path / "new")
    )
    assert list(before) == list(after)
    assert all(torch.equal(before[name] + 1, after[name]) for name in before)
    assert load_tokenizer(tmp_path / "new").text_to_ids("b") == [1]


def test_a_checkpoints_tokenizer_takes_options(checkpoint):
    tokenizer = load_tokenizer(checkpoint, chat_template="{{ messages }}")
    assert tokenizer.eos_id == 1 and tokenizer.has_chat_template


def test_overrides_reach_the_model(checkpoint):
    (chunk,) = load_megatron_model(checkpoint, mp_overrides={"params_dtype": torch.bfloat16, "bf16": True})
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.bfloat16}


def test_what_is_not_supported_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="model_type='mamba' is not supported"):
        load_megatron_model(checkpoint, model_type="mamba")
    with pytest.raises(ValueError, match="mlm_args is not supported"):
        build_and_load_model(checkpoint, None, mlm_args=object())
    with pytest.raises(RuntimeError, match="model-parallel state is not up"):
        load_megatron_model(checkpoint, skip_temp_dist_context=True)
    with pytest.raises(ValueError, match="ckpt_format='zarr' is not supported"):
        save_megatron_model([], tmp_path, ckpt_format="zarr")
    with pytest.raises(ValueError, match="hf_tokenizer_kwargs=.* is not supported"):
        save_megatron_model([], tmp_path, hf_tokenizer_kwargs={"use_fast": False})
    with pytest.raises(FileNotFoundError, match="nothing. is no directory: expected"):
        save_megatron_model([], tmp_path, hf_tokenizer_path=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        load_megatron_model(tmp_path / "nothing")


def test_weights_alone_take_the_place_of_a_directorys(checkpoint, hf, tmp_path):
    """In several files, beside what was there; the source itself is refused."""
    bridge = AutoBridge.from_hf_pretrained(hf)
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_text("old")
    with temporary_distributed_context():
        chunks = bridge.get_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_hf_weights(chunks, target, show_progress=False, max_shard_bytes=8000)
        with pytest.raises(ValueError, match="is the source of the conversion"):
            bridge.save_hf_weights(chunks, hf, show_progress=False)
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 1 and (target / "config.json").read_text() == "{}"
    assert not (target / "model.safetensors").exists()
    written = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    original = load_file(hf / "model.safetensors")
    assert set(written) == set(original)
    assert all(torch.equal(written[name], original[name]) for name in original)


def test_a_bridge_refuses_what_is_not_there(hf, tmp_path):
    bridge = AutoBridge.from_hf_pretrained(hf)
    assert bridge.get_model_config().num_layers == 1
    with pytest.raises(NotImplementedError, match="ModelOpt is not supported"):
        bridge.export_hf_weights_modelopt([])
    with pytest.raises(NotImplementedError, match="take save_hf_pretrained"):
        bridge.export_hf_weights_quant([])
    with pytest.raises(ValueError, match="hf_tokenizer_kwargs=.* is not supported"):
        bridge.save_megatron_model([], tmp_path, hf_tokenizer_kwargs={"use_fast": False})


def test_a_table_says_which_tensors_are_the_files(hf):
    bridge = AutoBridge.from_hf_pretrained(hf)
    with temporary_distributed_context():
        chunks = bridge.get_model(wrap_with_ddp=False, use_cpu_initialization=True)
        assert weights_verification_table(bridge, chunks).count("  equal") == len(load_file(hf / "model.safetensors"))
        with torch.no_grad():
            chunks[0].decoder.final_layernorm.weight.add_(1)
        assert "max difference 1" in weights_verification_table(bridge, chunks)


def test_adapters_are_loaded_over_their_weights(checkpoint, tmp_path):
    """The checkpoint names what they were trained on: a Megatron checkpoint here."""
    adapters = LoRA(target_modules=["linear_proj"], dim=2)
    with temporary_distributed_context():
        chunks = load_megatron_model(checkpoint)
        adapters(chunks, training=False)
        wanted = {name: weight for name, weight in chunks[0].named_parameters() if ".adapter." in name}
        with torch.no_grad():
            for weight in wanted.values():
                weight.fill_(0.5)
        run_config = {
            "model": to_yaml_dict(load_model_config(checkpoint)[0]),
            "peft": to_yaml_dict(adapters),
            "checkpoint": {"pretrained_checkpoint": str(checkpoint)},
        }
        save_model_checkpoint(chunks, tmp_path / "adapted", run_config=run_config)
    state = load_megatron_model(tmp_path / "adapted", return_state_dict=True)
    assert wanted and all(torch.equal(state[name], weight) for name, weight in wanted.items())
    assert torch.equal(state[NORM], load_megatron_model(checkpoint, return_state_dict=True)[NORM])
