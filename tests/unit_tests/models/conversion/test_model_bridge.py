# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A family that a script adds is converted as those of the package are."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from megatron.bridge.training.model_load_save import temporary_distributed_context
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.models import families
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from tests.unit_tests.models.tiny_llama import save_tiny_llama

LAYER, HF = "decoder.layers.*.", "model.layers.*."
MINE = "MineForCausalLM"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(families, "_registered", {})


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A Llama under another architecture's name."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("hf") / "mine", num_hidden_layers=2)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "architectures": [MINE]}))
    return directory


def table():
    return MegatronMappingRegistry(
        AutoMapping(megatron_param="embedding.word_embeddings.weight", hf_param="model.embed_tokens.weight"),
        AutoMapping(megatron_param="output_layer.weight", hf_param="lm_head.weight"),
        AutoMapping(megatron_param="decoder.final_layernorm.weight", hf_param="model.norm.weight"),
        AutoMapping(f"{LAYER}self_attention.linear_qkv.layer_norm_weight", f"{HF}input_layernorm.weight"),
        AutoMapping(f"{LAYER}mlp.linear_fc1.layer_norm_weight", f"{HF}post_attention_layernorm.weight"),
        AutoMapping(f"{LAYER}self_attention.linear_proj.weight", f"{HF}self_attn.o_proj.weight"),
        AutoMapping(f"{LAYER}mlp.linear_fc2.weight", f"{HF}mlp.down_proj.weight"),
        QKVMapping(
            megatron_param=f"{LAYER}self_attention.linear_qkv.weight",
            **{kind: f"{HF}self_attn.{kind}_proj.weight" for kind in "qkv"},
        ),
        GatedMLPMapping(
            megatron_param=f"{LAYER}mlp.linear_fc1.weight",
            gate=f"{HF}mlp.gate_proj.weight",
            up=f"{HF}mlp.up_proj.weight",
        ),
    )


class MineProvider(GPTModelProvider):
    """A class of the script's own."""


def register_written_out():
    """A bridge whose provider is written out field by field."""

    @MegatronModelBridge.register_bridge(source=MINE, target=GPTModel)
    class MineBridge(MegatronModelBridge):
        def provider_bridge(self, hf_pretrained):
            config = hf_pretrained.config
            return MineProvider(
                num_layers=config.num_hidden_layers,
                hidden_size=config.hidden_size,
                ffn_hidden_size=config.intermediate_size,
                num_attention_heads=config.num_attention_heads,
                num_query_groups=config.num_key_value_heads,
                vocab_size=config.vocab_size,
                seq_length=config.max_position_embeddings,
                normalization="RMSNorm",
                activation_func=F.silu,
                gated_linear_unit=True,
                position_embedding_type="rope",
                add_bias_linear=False,
                share_embeddings_and_output_weights=False,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                layernorm_epsilon=config.rms_norm_eps,
            )

        def mapping_registry(self):
            return table()

    return MineBridge


def register_as_most_are():
    """A bridge that takes the provider as most decoders have it."""

    @MegatronModelBridge.register_bridge(source=type(MINE, (), {}), target="GPTModel", model_type="mine")
    class MineBridge(MegatronModelBridge):
        def mapping_registry(self):
            return table()

    return MineBridge


@pytest.mark.parametrize("register", [register_written_out, register_as_most_are])
def test_a_family_of_a_script_is_converted_bit_for_bit(hf, tmp_path, register):
    assert not AutoBridge.can_handle(hf)
    register()
    assert AutoBridge.can_handle(hf) and MINE in AutoBridge.list_supported_models()
    bridge = AutoBridge.from_hf_pretrained(hf)
    if register is register_written_out:
        assert isinstance(bridge.get_model_config(), MineProvider)
    assert all(result.is_equal for result in bridge.check_roundtrip(show_progress=False))
    AutoBridge.import_ckpt(hf, tmp_path / "megatron", show_progress=False)
    bridge.export_ckpt(tmp_path / "megatron", tmp_path / "back", show_progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (hf, tmp_path / "back"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [MINE]


def test_exported_tensors_have_names(hf):
    register_as_most_are()
    bridge = AutoBridge.from_hf_pretrained(hf)
    with temporary_distributed_context():
        chunks = bridge.get_model(wrap_with_ddp=False, use_cpu_initialization=True)
        found = next(bridge.export_hf_weights(chunks, show_progress=False))
    assert isinstance(found, HFWeightTuple) and found.param_name == "model.embed_tokens.weight"
    assert found.weight.shape == (96, 32) and tuple(found) == (found.param_name, found.weight)


def test_a_family_of_the_package_can_be_replaced(hf, tmp_path):
    directory = shutil.copytree(hf, tmp_path / "llama")
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "architectures": ["LlamaForCausalLM"]}))
    families.register_family("LlamaForCausalLM", families.family_of({"architectures": ["Qwen2ForCausalLM"]}))
    assert AutoBridge.from_hf_pretrained(directory).family.provider_class.__name__ == "Qwen2ModelProvider"


def test_other_targets_and_arguments_are_refused():
    with pytest.raises(ValueError, match="target=MambaModel of MineForCausalLM is not supported"):
        MegatronModelBridge.register_bridge(source=MINE, target="MambaModel")
    with pytest.raises(ValueError, match="has no argument sauce"):
        MegatronModelBridge.register_bridge(source=MINE, target=GPTModel, sauce=1)
    with pytest.raises(TypeError, match="abstract"):
        MegatronModelBridge.register_bridge(source=MINE, target=GPTModel)(MegatronModelBridge)
