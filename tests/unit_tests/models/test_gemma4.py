# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What Gemma 4's configuration asks for and can't be built is refused by the key's name."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.activation_memory import layer_bytes_per_token
from megatron.bridge.models.families import build_provider
from megatron.bridge.models.gemma4 import Gemma4ModelProvider
from megatron.bridge.models.gemma4_experts import ScaledRouter, experts_beside_mlp_spec
from megatron.bridge.models.gemma4_layers import NormThenAddAndScale, cap_logits
from megatron.bridge.models.layer_kinds import LayerKind
from megatron.bridge.models.router_gemm import repair_router_gemm
from tests.rigs.families import MODELS
from tests.rigs.ranks import run_on_ranks
from tests.unit_tests.models.tiny_llama import SMALL, megatron_logits, some_tokens

FULL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}


def provider_with(model="gemma4", **changes):
    config = transformers.Gemma4TextConfig(**{**SMALL, **MODELS[model].options, **changes}).to_dict()
    return build_provider({**config, "architectures": ["Gemma4ForCausalLM"]})


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size_per_layer_input": 8, "hidden_size_per_layer_input": 8},
        {"use_bidirectional_attention": "all"},
        {"attention_bias": True},
        {"hidden_activation": "silu"},
        {"per_layer_config": {0: {"head_dim": 16}}},
        {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 12}}},
        {"rope_parameters": {"full_attention": SLIDING, "sliding_attention": SLIDING}},
        {"rope_parameters": {"full_attention": {**FULL, "factor": 8.0}, "sliding_attention": SLIDING}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_built_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=rf"config\.json: .*{next(iter(changes))}") as refused:
        provider_with(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", None),
        ("top_k_experts", 1),
        ("moe_intermediate_size", None),
        ("num_kv_shared_layers", 2),
        ("hidden_size_per_layer_input", 8),
    ],
)
def test_experts_that_cannot_be_built_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"config\.json: {key}={value}") as refused:
        provider_with("gemma4_experts", vocab_size_per_layer_input=101, **{key: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("moe_shared_expert_overlap", True),
        ("moe_shared_expert_gate", True),
        ("moe_shared_expert_intermediate_size", None),
        ("moe_layer_freq", [1, 1, 0, 1]),
        ("num_kv_shared_layers", 2),
        ("hidden_size_per_layer_input", 8),
    ],
)
def test_what_experts_beside_an_mlp_cannot_have_is_refused(field, value):
    provider = provider_with("gemma4_experts")
    setattr(provider, field, value)
    with pytest.raises(ValueError, match=rf"model\.{field}={re.escape(str(value))} .*set it to") as refused:
        provider.finalize()
    assert "\n" not in str(refused.value)


def test_layers_without_cores_experts_are_refused():
    block = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec()], layer_norm=torch.nn.Identity)
    with pytest.raises(ValueError, match=r"model\.transformer_layer_spec has .*MLP.*: expected .*MoELayer"):
        experts_beside_mlp_spec(block)


def kept_by_router_on_rank():
    """Bytes of each token and channel that the router keeps for its backward pass, in bf16, its input aside."""
    from megatron.core import parallel_state

    provider = provider_with("gemma4_experts")
    provider.params_dtype, provider.hidden_size, provider.num_attention_heads = torch.bfloat16, 4096, 8
    provider.finalize()
    provider.initialize_model_parallel()
    groups = SimpleNamespace(tp=parallel_state.get_tensor_model_parallel_group(), cp=None, tp_cp=None, tp_dp_cp=None)
    repair_router_gemm()
    router = ScaledRouter(provider, pg_collection=groups)
    residual = torch.randn(256, 1, 4096, dtype=torch.bfloat16, requires_grad=True)
    outside = {one.data_ptr() for one in (residual, *router.parameters())}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in outside:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        router(residual)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 256 / 4096


def test_the_estimate_counts_what_the_router_keeps_and_two_norms_inputs():
    (of_router,) = run_on_ranks(kept_by_router_on_rank, 1)
    provider = provider_with("gemma4_experts")
    provider.finalize()
    layer = layer_bytes_per_token(provider, LayerKind(is_moe=True))
    experts, mlp = 2 * (4 * 32 + 6 * 16), 6 * 48
    without = layer_bytes_per_token(provider, LayerKind()) - 6 * 48 + experts + mlp
    assert layer - without == 32 * (round(of_router) + 2 * 2)


def test_full_layers_have_sizes_of_their_own():
    provider = provider_with()
    sliding, full = provider.of_layer(1), provider.of_layer(2)
    assert (sliding.kv_channels, sliding.num_query_groups, sliding.values_are_keys) == (8, 2, False)
    assert (full.kv_channels, full.num_query_groups, full.values_are_keys) == (12, 1, True)
    assert provider.kv_channels == 8, "unchanged"


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_scaling", True), ("seq_len_interpolation_factor", 2.0), ("qk_layernorm", False)],
)
def test_what_attention_of_two_sizes_cannot_have_is_refused(field, value):
    provider = Gemma4ModelProvider(num_layers=2, hidden_size=32, num_attention_heads=4, **{field: value})
    with pytest.raises(ValueError, match=rf"model\.{field}={value}"):
        provider.finalize()


def test_the_part_of_a_head_that_turns_is_read_without_a_word(caplog):
    assert provider_with().rotary_percent == 0.25
    assert "partial_rotary_factor" not in caplog.text, "other families ignore it, and say so"


def test_the_scale_of_a_layer_has_the_dtype_of_the_weights():
    """In FP32 it would make the layers' output FP32, and files in bf16 would be said to be cast."""
    config = Gemma4ModelProvider(num_layers=2, hidden_size=4, num_attention_heads=1, params_dtype=torch.bfloat16)
    add = NormThenAddAndScale(add=lambda *_: torch.add, norm=torch.nn.Identity, config=config)
    assert add.layer_scalar.dtype is torch.bfloat16


def angles_on_rank():
    """The shape of each layer's angles, and whether they lie in memory row by row, at a query's rotation."""
    from megatron.core.transformer import attention

    provider = provider_with()
    provider.initialize_model_parallel()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    rotate, seen = attention.apply_rotary_pos_emb, []

    def rotate_seen(rows, angles, *arguments, **options):
        seen.append((tuple(angles.shape), angles.is_contiguous()))
        return rotate(rows, angles, *arguments, **options)

    attention.apply_rotary_pos_emb = rotate_seen
    megatron_logits(chunks, some_tokens(provider.vocab_size))
    return seen[::2]


def test_angles_lie_row_by_row():
    """Transformer Engine's fused rotation reads their memory and not their strides."""
    (layers,) = run_on_ranks(angles_on_rank, 1)
    assert layers == [((32, 1, 1, channels), True) for channels in (8, 12, 8, 12)]


def test_ranks_that_cannot_share_the_groups_of_full_layers_are_refused():
    sizes = {"num_attention_heads": 12, "num_query_groups": 4, "num_global_query_groups": 3}
    provider = Gemma4ModelProvider(num_layers=2, hidden_size=48, tensor_model_parallel_size=4, **sizes)
    with pytest.raises(ValueError, match=r"model\.num_global_query_groups"):
        provider.finalize()


def test_logits_are_capped_before_padding_is_masked():
    class Output(torch.nn.Module):
        def forward(self, logits):
            return logits, None

    layer = Output()
    layer.register_forward_hook(lambda _layer, _inputs, output: (torch.cat([output[0], torch.tensor([-1e4])]), None))
    cap_logits(layer, 2.0)
    logits, _ = layer(torch.tensor([1.0, 100.0, -100.0]))
    torch.testing.assert_close(logits, torch.tensor([2 * torch.tanh(torch.tensor(0.5)), 2.0, -2.0, -1e4]))
