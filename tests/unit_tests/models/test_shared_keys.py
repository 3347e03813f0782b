# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Keys and values that layers share, and inputs of each layer's own: their gradients are those of transformers."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.models.gemma4 import Gemma4ModelProvider
from megatron.bridge.models.shared_keys import source_of, sources
from megatron.bridge.utils.simulated_accelerator import suspended
from tests.rigs.families import MODELS
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import save_tiny_model, some_tokens

MODEL = MODELS["gemma4_e2b"]
TOKENS = some_tokens(MODEL.options["vocab_size"])
RECOMPUTED = [
    {},
    *({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": n} for n in (1, 3)),
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
]
"""Groups of 3 layers end between layers and those that take their keys."""


def _gradients_on_rank(directory, options):
    bridge = AutoBridge.from_hf_pretrained(directory)
    provider = bridge.to_megatron_provider()
    for name, value in options.items():
        setattr(provider, name, value)
    chunks = provider.provide_distributed_model()
    positions = torch.arange(TOKENS.shape[1])[None].expand(TOKENS.shape[0], -1)
    chunks[0](TOKENS, positions, None, labels=TOKENS).float().mean().backward()
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    exported = bridge.export_hf_weights(chunks, cpu=True, show_progress=False)
    return {name: gradient.numpy() for name, gradient in exported}


def _gradients_of_all(directory):
    return [_gradients_on_rank(directory, options) for options in RECOMPUTED]


def _gradients_in_transformers(directory):
    with suspended():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logits = model(TOKENS).logits
        F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_transformers_recomputed_or_not(tmp_path):
    hf = save_tiny_model(tmp_path, MODEL.architecture, **MODEL.options)
    expected = _gradients_in_transformers(hf)
    (found,) = run_on_ranks(_gradients_of_all, 1, hf)
    for gradients in found:
        assert expected.keys() == {name for name in gradients if not name.endswith("layer_scalar")}
        for name, gradient in expected.items():
            largest, distance = gradient.abs().max(), (torch.from_numpy(gradients[name]) - gradient).abs().max()
            assert largest > 1e-5 and distance < 1e-4 * largest, name


def _provider(slides, taking):
    shape = {"num_layers": len(slides), "hidden_size": 32, "num_attention_heads": 4, "window_size": (6, 0)}
    return Gemma4ModelProvider(**shape, window_attn_skip_freq=slides, num_kv_shared_layers=taking)


def test_a_layer_takes_keys_of_the_last_layer_of_its_kind_that_has_some():
    provider = _provider([0, 1, 1, 1, 0, 0], taking=3)
    assert [source_of(provider, number) for number in range(1, 7)] == [None, None, None, 3, 1, 1]
    assert sources(provider) == [1, 3]
    assert sources(_provider([0, 1, 0], taking=1)) == [1]
    assert sources(_provider([0, 1, 0], taking=0)) == []


def test_layers_whose_kind_no_layer_before_them_has_are_refused():
    with pytest.raises(ValueError, match=r"model\.num_kv_shared_layers=2 of model\.num_layers=3: layer 3 has no"):
        _provider([1, 1, 0], taking=2).finalize()


def test_pipeline_stages_are_refused_because_only_the_output_is_sent_on():
    for fields in ({"num_kv_shared_layers": 1}, {"hidden_size_per_layer_input": 4}):
        provider = _provider([0, 1, 0], taking=0)
        provider.pipeline_model_parallel_size = 2
        for name, value in fields.items():
            setattr(provider, name, value)
        with pytest.raises(ValueError, match=r"model\.pipeline_model_parallel_size=2 .* set it to 1") as refused:
            provider.finalize()
        assert "\n" not in str(refused.value)
