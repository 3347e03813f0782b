# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Queries grow by the position of their token in its sample: alone, packed, generated, recomputed."""

import pytest
import torch

from megatron.bridge.models.ministral3 import Ministral3ModelProvider
from megatron.bridge.models.scaled_queries import RotaryWithScales, query_scales
from tests.rigs.families import MODELS
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.test_rope_by_length import logits_on_rank
from tests.unit_tests.models.tiny_llama import hf_logits, save_tiny_model, some_tokens


def test_scales_are_those_of_transformers():
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    positions = torch.tensor([[0, 1, 16383, 16384, 40000], [7, 5, 3, 262143, 32768]])
    expected = get_llama_4_attn_scale(positions, 0.1, 16384)[:, 0, :, 0]
    assert torch.equal(query_scales(positions, beta=0.1, original_length=16384), expected)


def test_short_rows_need_no_scales_and_long_ones_need_positions():
    class Plain(torch.nn.Module):
        get_rotary_seq_len = None

        def forward(self, length):
            return torch.zeros(length, 1, 1, 8)

    rotary = RotaryWithScales(Plain(), beta=0.1, original_length=16)
    assert rotary(16).shape == (16, 1, 1, 8)
    with pytest.raises(ValueError, match="position_ids=None on rows of up to 17 tokens"):
        rotary(17)


@pytest.mark.parametrize(
    ("field", "value"), [("position_embedding_type", "rope"), ("flash_decode", True), ("fused_single_qkv_rope", True)]
)
def test_what_would_leave_queries_unscaled_is_refused(field, value):
    provider = Ministral3ModelProvider(num_layers=2, hidden_size=32, num_attention_heads=8, **{field: value})
    with pytest.raises(ValueError, match=rf"model\.{field}={value!r}: the family scales queries"):
        provider.finalize()


def _gradients(directory, samples, *, recompute):
    """Of two micro-batches that are both on their way before the first goes back."""
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(directory).to_megatron_provider()
    if recompute:
        provider.recompute_granularity, provider.recompute_method, provider.recompute_num_layers = "full", "uniform", 1
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    model.train()
    losses = [model(text, positions, None, labels=text).mean() for text, positions in samples]
    for loss in losses:
        loss.backward()
    return [parameter.grad.numpy() for parameter in model.parameters()]


def _on_rank(directory, texts, samples):
    found = logits_on_rank(directory, texts)
    return found, *(_gradients(directory, samples, recompute=recompute) for recompute in (False, True))


def test_each_token_goes_by_its_position_in_its_own_sample(tmp_path):
    model = MODELS["ministral3"]
    directory = save_tiny_model(tmp_path, model.architecture, **{**model.options, "num_hidden_layers": 2})
    tokens = some_tokens(model.options["vocab_size"])
    texts = [tokens[0][:13].tolist(), tokens[1][:19].tolist(), tokens[0].tolist()]
    samples = [(tokens, torch.arange(32).expand(2, -1)), (tokens, torch.arange(16).repeat(2, 2))]
    expected = [hf_logits(directory, torch.tensor([text])) for text in texts]
    (((alone, packed, new, together), kept, again),) = run_on_ranks(_on_rank, 1, directory, texts, samples)
    for found, wanted in zip(alone, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(packed), torch.cat(expected[:2], 1), rtol=0, atol=1e-4)
    whole = texts[1] + new  # read at once
    assert new == hf_logits(directory, torch.tensor([whole]))[0, len(texts[1]) - 1 : -1].argmax(-1).tolist()
    assert together[1] == new
    assert all((first == second).all() for first, second in zip(kept, again, strict=True))
