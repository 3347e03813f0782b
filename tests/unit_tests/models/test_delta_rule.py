# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The chunked rule is the recurrence that its documentation states, and no sample reaches into the next."""

import pytest
import torch

from megatron.bridge.models.delta_rule import causal_convolution, gated_delta_rule, sample_numbers
from megatron.bridge.models.packed_attention import separate_causal_mask

pytestmark = pytest.mark.any_core

BATCH, HEADS, KEY, VALUE = 2, 2, 6, 5
BOUNDS = [0, 37, 38, 102, 150]
"""Samples that begin within chunks, one token alone, and a chunk that belongs to one sample."""


def inputs(length=150):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.rand(BATCH, HEADS, length, *shape, generator=generator)

    query, key, value = random(KEY) - 0.5, torch.nn.functional.normalize(random(KEY) - 0.5, dim=-1), random(VALUE)
    return query, key, value, -2 * random(), random()


def recurrence(query, key, value, decay, beta):
    state, outputs = torch.zeros(BATCH, HEADS, KEY, VALUE, dtype=torch.float64), []
    for q, k, v, g, b in zip(*(one.double().unbind(2) for one in (query, key, value, decay, beta)), strict=True):
        state = state * g.exp()[..., None, None]
        update = b[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
        state = state + torch.einsum("bhk,bhv->bhkv", k, update)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q))
    return torch.stack(outputs, 2), state


def rule(query, key, value, decay, beta, **options):
    return gated_delta_rule(query, key, value, decay=decay, beta=beta, **options)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 2e-6 * max(1.0, other.abs().max())


@pytest.mark.parametrize("length", [1, 64, 150])
def test_chunks_give_the_recurrence(length):
    tensors = inputs(length)
    assert_close(rule(*tensors), recurrence(*tensors))


def test_a_state_continues_where_it_was_left():
    tensors = inputs()
    first, state = rule(*(one[:, :, :70] for one in tensors))
    rest, state = rule(*(one[:, :, 70:] for one in tensors), state=state)
    assert_close((torch.cat([first, rest], 2), state), recurrence(*tensors))


def test_samples_are_computed_as_if_alone():
    tensors = inputs()
    ends = torch.tensor(BOUNDS)
    sample_of = sample_numbers(None, ends, batch=BATCH, length=150)
    mask = separate_causal_mask(ends[None].int(), seq_length=150)
    by_mask = sample_numbers(mask, None, batch=BATCH, length=150)
    assert torch.equal(by_mask - by_mask[:, :1], sample_of - sample_of[:, :1]) and by_mask.shape == (BATCH, 150)
    alone = [
        recurrence(*(one[:, :, start:end] for one in tensors))
        for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True)
    ]
    expected = torch.cat([outputs for outputs, _ in alone], 2), alone[-1][1]
    assert_close(rule(*tensors, sample_of=sample_of), expected)


def test_gradients_are_numbers_and_stay_within_a_sample():
    tensors = inputs()
    tensors = (*tensors[:3], 400 * tensors[3], tensors[4])  # exp of what is to come would be infinite
    for one in tensors:
        one.requires_grad_()
    sample_of = sample_numbers(None, torch.tensor(BOUNDS), batch=BATCH, length=150)
    rule(*tensors, sample_of=sample_of)[0][:, :, 102:].square().sum().backward()
    for one in tensors:
        assert one.grad.isfinite().all() and not one.grad[:, :, :102].any()
    assert all(one.grad[:, :, 102:].any() for one in tensors[:3])


def test_convolution_is_torchs_and_begins_anew_with_each_sample():
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.rand(BATCH, 150, 7, generator=generator), torch.rand(7, 1, 4, generator=generator)

    def expected(part):
        padded = torch.nn.functional.pad(part.transpose(1, 2), (3, 0))
        return torch.nn.functional.conv1d(padded, weight, groups=7).transpose(1, 2)

    assert torch.allclose(causal_convolution(x, weight), expected(x), atol=1e-6)
    before, after = x[:, :60], x[:, 60:]
    assert torch.allclose(causal_convolution(after, weight, before=before[:, -3:]), expected(x)[:, 60:], atol=1e-6)
    sample_of = sample_numbers(None, torch.tensor(BOUNDS), batch=BATCH, length=150)
    alone = torch.cat([expected(x[:, start:end]) for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True)], 1)
    assert torch.allclose(causal_convolution(x, weight, sample_of=sample_of), alone, atol=1e-6)


def test_rows_without_a_mask_are_one_sample():
    assert sample_numbers(None, None, batch=2, length=5) is None
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).triu(1)
    assert sample_numbers(causal, None, batch=2, length=5).tolist() == [[0] * 5] * 2
