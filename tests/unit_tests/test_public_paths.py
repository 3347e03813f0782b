# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Names that scripts for Megatron Bridge import are what they are elsewhere in the package."""

import importlib

import pytest

SAME = [
    ("data.packing", "PackedSequenceSpecs", "data.sft_options"),
    ("peft", "LoRA", "peft.lora"),
    ("peft", "DoRA", "peft.dora"),
    ("peft", "PEFT", "peft.base"),
    ("training.tokenizers.tokenizer", "build_tokenizer", "data.tokenizer"),
    ("data.base", "DatasetBuildContext", "data.config"),
]


@pytest.mark.parametrize(("path", "name", "home"), SAME)
def test_a_public_path_gives_the_object_itself(path, name, home):
    found, own = (importlib.import_module(f"megatron.bridge.{module}") for module in (path, home))
    assert getattr(found, name) is getattr(own, name)


@pytest.mark.parametrize("path", ["models", "peft", "models.hf_pretrained"])
def test_a_door_knows_only_its_own_names(path):
    module = importlib.import_module(f"megatron.bridge.{path}")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_any_tokenizer_is_a_megatron_tokenizer():
    from megatron.bridge.data.tokenizer import NullTokenizer
    from megatron.bridge.training.tokenizers.tokenizer import MegatronTokenizer

    assert isinstance(NullTokenizer(8), MegatronTokenizer) and not isinstance("text", MegatronTokenizer)
