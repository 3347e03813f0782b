# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Norms after attention and MLP, and rotary positions of each kind of layer, out of a block's spec."""

import copy

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.gemma3 import Gemma3ModelProvider
from megatron.bridge.models.layer_specs import local_layer_spec
from megatron.bridge.models.sandwich_layers import NormThenAdd, SelfAttentionOfItsKind, sandwich_spec
from tests.rigs.ranks import run_on_ranks


class AnotherNorm(torch.nn.Module):
    """Stands for Transformer Engine's."""

    def __init__(self, config, hidden_size, eps):
        super().__init__()
        self.factor = 3.0

    def forward(self, x):
        return self.factor * x


def provider(**fields):
    return Gemma3ModelProvider(num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, **fields)


def specs_on_rank():
    model = provider()
    model.initialize_model_parallel()
    model.finalize()
    block = local_layer_spec(model)
    block.layer_norm = AnotherNorm
    made = sandwich_spec(block, model)
    before, after = block.layer_specs[0].submodules, made.layer_specs[0].submodules
    assert before.self_attention.module is SelfAttention and not isinstance(before.mlp_bda, ModuleSpec), "unchanged"
    assert after.self_attention.module is SelfAttentionOfItsKind and after.mlp is before.mlp
    assert {after.self_attn_bda.module, after.mlp_bda.module} == {NormThenAdd}
    return [spec.params["norm"] is AnotherNorm for spec in (after.self_attn_bda, after.mlp_bda)]


def test_the_added_norms_are_of_the_class_of_the_final_one():
    assert run_on_ranks(specs_on_rank, 1) == [[True, True]]


def test_the_output_is_normalised_and_the_residual_is_not():
    def add(training, fused):
        return lambda output_and_bias, residual, dropout: output_and_bias[0] + residual

    block = NormThenAdd(add=add, norm=AnotherNorm, config=provider())
    output, bias, residual = torch.ones(2, 1, 4), torch.full((4,), 0.5), torch.full((2, 1, 4), 10.0)
    assert torch.equal(block(True, False)((output, bias), residual, 0.0), torch.full((2, 1, 4), 14.5))
    copied = copy.deepcopy(block)
    copied.norm.factor = 5.0
    assert torch.equal(copied(True, False)((output, None), residual, 0.0), torch.full((2, 1, 4), 15.0)), "its own norm"


@pytest.mark.parametrize(
    "spec", [ModuleSpec(module=torch.nn.Identity), TransformerBlockSubmodules(layer_specs=[], layer_norm=None)]
)
def test_a_spec_that_names_no_norm_is_refused(spec):
    with pytest.raises(ValueError, match=r"transformer_layer_spec gives a .*: this family needs the layers"):
        sandwich_spec(spec, provider())


@pytest.mark.parametrize(("field", "value"), [("position_embedding_type", "none"), ("flash_decode", True)])
def test_positions_without_a_base_for_each_kind_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"model\.{field}=.*for each kind of layer"):
        provider(**{field: value}).finalize()
