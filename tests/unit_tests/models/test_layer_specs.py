# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import logging
from functools import partial

import pytest
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron.bridge.models import gpt_provider, layer_specs
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.torch_norm import TorchNorm
from tests.rigs.ranks import run_on_ranks


def classes_in(spec):
    """Every class that a spec names."""
    if isinstance(spec, type):
        return [spec]
    if isinstance(spec, list):
        return [found for item in spec for found in classes_in(item)]
    if isinstance(spec, ModuleSpec):
        return [*classes_in(spec.module), *classes_in(spec.submodules)]
    if isinstance(spec, partial):
        return classes_in(list(spec.keywords.values()))
    if dataclasses.is_dataclass(spec):
        return [found for field in dataclasses.fields(spec) for found in classes_in(getattr(spec, field.name))]
    return []


def provider(**fields):
    return GPTModelProvider(num_layers=2, hidden_size=16, num_attention_heads=2, normalization="RMSNorm", **fields)


@pytest.mark.parametrize(
    ("transformer_impl", "simulated", "has_te", "name", "reason"),
    [
        ("local", False, True, "local", "transformer_impl=local"),
        ("transformer_engine", True, True, "local", "simulated"),
        ("transformer_engine", False, False, "local", "not installed"),
        ("transformer_engine", False, True, "transformer_engine", "is installed"),
    ],
)
def test_choice_and_reason(monkeypatch, transformer_impl, simulated, has_te, name, reason):
    monkeypatch.setattr(layer_specs, "is_simulated", lambda: simulated)
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: has_te)
    chosen, why = layer_specs.choose_layer_spec(provider(transformer_impl=transformer_impl))
    assert chosen == name and reason in why


@pytest.mark.parametrize(
    ("spec", "has_te", "reason"),
    [
        (layer_specs.local_layer_spec, True, "model.transformer_layer_spec=local_layer_spec"),
        (layer_specs.default_layer_spec, False, "Transformer Engine is not installed"),
        (layer_specs.default_layer_spec, True, None),
        (layer_specs.transformer_engine_layer_spec, False, None),
        (lambda config: None, False, None),
    ],
)
def test_layers_that_will_be_local_are_known_before_they_are_built(monkeypatch, spec, has_te, reason):
    monkeypatch.setattr(layer_specs, "is_simulated", lambda: False)
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: has_te)
    assert layer_specs.why_local(provider(transformer_layer_spec=spec)) == reason


def local_spec_on_rank(fields):
    model = provider(**fields)
    model.initialize_model_parallel()
    model.finalize()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    layer_specs.logger.setLevel(logging.INFO)
    layer_specs.logger.addHandler(handler)
    block = layer_specs.default_layer_spec(model)
    layer_specs.logger.removeHandler(handler)
    return classes_in(block), block.layer_norm, messages


@pytest.mark.parametrize("fields", [{}, {"qk_layernorm": True}, {"num_moe_experts": 2}])
def test_local_layers_have_only_norms_that_know_sequence_parallelism(fields):
    classes, final_norm, messages = run_on_ranks(local_spec_on_rank, 1, fields)[0]
    assert final_norm is TorchNorm
    assert classes.count(TorchNorm) == (2 if fields.get("qk_layernorm") is None else 4) * 2 + 1
    assert WrappedTorchNorm not in classes and FusedLayerNorm not in classes
    assert len(messages) == 1 and messages[0].startswith("layer spec: local (")


def test_layers_that_predict_further_tokens_are_refused():
    provider = GPTModelProvider(num_layers=1, hidden_size=32, num_attention_heads=4)
    assert gpt_provider.mtp_block_spec(provider) is None
    provider.mtp_num_layers = 1
    with pytest.raises(NotImplementedError, match="model.mtp_num_layers=1: .* unset it"):
        gpt_provider.mtp_block_spec(provider)
    with pytest.raises(NotImplementedError, match="model.mtp_num_layers=1: .* unset it"):
        provider.finalize()  # before a model is built, which would be one without them
