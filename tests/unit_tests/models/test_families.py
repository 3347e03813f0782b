# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Every family has its test, its row in the documentation and its door."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers

import megatron.bridge.models as doors
from megatron.bridge.models.conversion import transformers_config
from megatron.bridge.models.families import FAMILY_MODULES, build_provider, family_of, provider_fields
from tests.functional_tests import test_families_finetune, test_lora_export
from tests.rigs.families import MODELS, table

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
MARKED = r"(?<=`tests/rigs/families.py` -->\n).*?(?=<!-- /families -->)"


def test_every_family_is_tested():
    assert {model.architecture for model in MODELS.values()} == set(FAMILY_MODULES)


def test_documentation_holds_the_table_of_what_is_tested():
    text = DOCUMENT.read_text(encoding="utf-8")
    written = re.search(MARKED, text, re.DOTALL)[0]
    expected = table(_trained(), _adapted())
    assert written == expected, f"put this between the marks of {DOCUMENT}:\n{expected}"


def _trained():
    """Where each model is trained with offload and without: in the families' own runs, and Qwen3-Next's."""
    others = [*test_families_finetune.OTHERS, "qwen3_next"]
    families = test_families_finetune.FAMILIES.items()
    return dict.fromkeys(others, "TP2 SP") | {
        name: "TP2 EP2 ETP1" if sizes else "TP2 SP" for name, (sizes, *_) in families
    }


def _adapted():
    """The adapters of each model that are exported, and give peft the logits of the run."""
    tests = test_lora_export
    words = {"lora": "LoRA", "dora": "DoRA", "canonical_lora": "CanonicalLoRA"}
    rows = [(name, words[scheme]) for name, scheme, *_ in tests.CELLS.values()]
    rows += [(name, "LoRA") for name in (*tests.ONE_LAYER, *tests.BESIDE_EXPERTS)]
    experts = {case: "lora" for case in tests.EXPERTS} | {case: scheme for case, (scheme, *_) in tests.STACKED.items()}
    for case, scheme in experts.items():
        shared = "shared " if "shared" in case else ""
        rows.append((case.partition(",")[0], f"{shared}{words[scheme]} of experts"))
    return {name: ", ".join(dict.fromkeys(kind for of, kind in rows if of == name)) for name, _ in rows}


def test_every_provider_has_a_door():
    for architecture in FAMILY_MODULES:
        provider = family_of({"architectures": [architecture]}).provider_class
        assert getattr(doors, provider.__name__) is provider
        experts = provider(num_layers=2, hidden_size=32, num_attention_heads=8).num_moe_experts
        assert experts in (None, 8, 32, 128, 256, 512)


def test_a_provider_with_two_bases_has_the_defaults_of_the_nearer_one():
    for architecture in FAMILY_MODULES:
        provider = family_of({"architectures": [architecture]}).provider_class
        defaults = {field.name: field.default for field in dataclasses.fields(provider)}
        given = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
        assert given == {name: getattr(provider, name) for name in given}, provider


def test_no_weight_is_mapped_twice():
    for architecture in FAMILY_MODULES:
        names = [mapping.megatron_name for mapping in family_of({"architectures": [architecture]}).mappings]
        assert len(names) == len(set(names))


def test_a_family_that_transformers_is_too_old_for_is_refused(monkeypatch):
    """4.57 has no Qwen3.5, and reads any file as a configuration without a class."""
    monkeypatch.setattr(transformers_config, "config_class_of", lambda *_: transformers.PretrainedConfig)
    for read in (provider_fields, build_provider):
        with pytest.raises(ValueError, match=rf"transformers {transformers.__version__} doesn't know: install a newer"):
            read({"architectures": ["Qwen3_5ForCausalLM"], "rope_parameters": {"rope_theta": 1e7}})
