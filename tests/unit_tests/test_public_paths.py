# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Names that scripts for Megatron Bridge import are what they are elsewhere in the package."""

import importlib

import pytest

SAME = [
    ("data.packing", "PackedSequenceSpecs", "data.sft_options"),
    ("peft", "LoRA", "peft.lora"),
    ("peft.lora", "get_lora_plus_config_overrides", "peft.lora_plus"),
    ("peft", "CanonicalLoRA", "peft.canonical_lora"),
    ("peft", "DoRA", "peft.dora"),
    ("peft", "PEFT", "peft.base"),
    ("training.tokenizers.tokenizer", "build_tokenizer", "data.tokenizer"),
    ("data.builders", "GPTSFTDatasetConfig", "data.config"),
    ("data.builders", "MockGPTDatasetConfig", "data.config"),
    ("models.gpt_provider", "local_layer_spec", "models.layer_specs"),
    ("models.gpt_provider", "transformer_engine_layer_spec", "models.layer_specs"),
    ("data.utils", "build_datasets", "data.loaders"),
    ("models.conversion", "weights_verification_table", "models.conversion.utils"),
    ("recipes.qwen.h100", "build", "recipes.h100"),
    ("training.deepep", "apply_deepep", "models.expert_dispatch"),
    ("training.flex_dispatcher_backend", "apply_flex_dispatcher_backend", "models.expert_dispatch"),
    ("training.utils.moe_token_drop", "apply_moe_token_drop", "models.expert_dispatch"),
    ("training.utils.theoretical_memory_utils", "estimate_training_memory", "planning.theoretical_memory"),
    ("recipes.gpt", "vanilla_gpt_pretrain_config", "recipes.gpt.vanilla_gpt"),
    ("recipes.llama.llama3", "llama32_1b_sft_config", "recipes.llama"),
    ("recipes.gemma", "gemma3_1b_peft_config", "recipes.gemma3"),
    ("recipes.gemma.gemma3", "gemma3_4b_sft_config", "recipes.gemma3"),
    ("recipes.qwen", "qwen25_7b_peft_config", "recipes.qwen2"),
    ("recipes.qwen.qwen3", "qwen3_4b_pretrain_config", "recipes.qwen3"),
    ("recipes.qwen.qwen3_moe", "qwen3_30b_a3b_pretrain_config", "recipes.qwen3_moe"),
    ("recipes.qwen", "qwen3_next_80b_a3b_sft_config", "recipes.qwen3_next"),
    ("recipes.qwen", "qwen35_text_9b_pretrain_config", "recipes.qwen35"),
    ("recipes.qwen.qwen3_next", "qwen3_next_80b_a3b_sft_config", "recipes.qwen3_next"),
    ("recipes.moonlight", "moonlight_16b_peft_config", "recipes.deepseek_v3"),
    ("recipes.utils", "apply_determinism_overrides", "recipes.utils.determinism_utils"),
    ("data.base", "DatasetBuildContext", "data.config"),
]


@pytest.mark.parametrize(("path", "name", "home"), SAME)
def test_a_public_path_gives_the_object_itself(path, name, home):
    found, own = (importlib.import_module(f"megatron.bridge.{module}") for module in (path, home))
    assert getattr(found, name) is getattr(own, name)


@pytest.mark.parametrize("path", ["models", "models.conversion", "peft", "models.hf_pretrained", "recipes.utils"])
def test_a_door_knows_only_its_own_names(path):
    module = importlib.import_module(f"megatron.bridge.{path}")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_any_tokenizer_is_a_megatron_tokenizer():
    from megatron.bridge.data.tokenizer import NullTokenizer
    from megatron.bridge.training.tokenizers.tokenizer import MegatronTokenizer

    assert isinstance(NullTokenizer(8), MegatronTokenizer) and not isinstance("text", MegatronTokenizer)


def test_the_dataset_provider_of_a_configuration_builds_it():
    from megatron.bridge.data.config import DatasetBuildContext, MockGPTDatasetConfig
    from megatron.bridge.data.loaders import build_datasets
    from megatron.bridge.data.utils import get_dataset_provider

    assert get_dataset_provider(MockGPTDatasetConfig(seq_length=8)) is build_datasets
    with pytest.raises(ValueError, match="dataset is a str"):
        get_dataset_provider("text")("text", DatasetBuildContext(1, 1, 1))
