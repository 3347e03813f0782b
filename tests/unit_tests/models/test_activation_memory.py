# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The formula for activations: the paper's own figure, how layouts share it, and what recomputation leaves."""

import dataclasses

import pytest
import torch

from megatron.bridge.models.activation_memory import activation_bytes, layer_bytes_per_token, logit_bytes
from megatron.bridge.models.deepseek_v3 import DeepSeekV3ModelProvider
from megatron.bridge.models.gemma3 import Gemma3ModelProvider
from megatron.bridge.models.gemma4 import Gemma4ModelProvider
from megatron.bridge.models.glm4 import GLM4ModelProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.layer_kinds import LayerKind
from megatron.bridge.models.llama import LlamaModelProvider
from megatron.bridge.models.mixtral import MixtralModelProvider
from megatron.bridge.models.olmo2 import OLMo2ModelProvider
from megatron.bridge.models.per_layer_inputs import AddLayerInput
from megatron.bridge.models.qwen3_5 import Qwen35ModelProvider
from tests.rigs.ranks import run_on_ranks

DENSE, EXPERTS, DELTA_NET = LayerKind(), LayerKind(is_moe=True), LayerKind(is_delta_net=True)

GPT = GPTModelProvider(
    num_layers=4, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, seq_length=32, vocab_size=100
)


def _bytes(model, *, layers=4, in_flight=1):
    return activation_bytes(model, kinds=[DENSE] * layers, micro_batch_size=2, micro_batches_in_flight=in_flight)


def test_a_layer_of_the_papers_gpt_keeps_34_bytes_a_channel_less_its_dropout_masks():
    assert layer_bytes_per_token(GPT, DENSE) == (34 - 2) * 64


def test_tensor_parallel_ranks_share_all_but_the_norms_and_with_sequence_parallelism_these_too():
    halved = dataclasses.replace(GPT, tensor_model_parallel_size=2)
    assert layer_bytes_per_token(halved, DENSE) == (8 + 24 / 2) * 64
    halved.sequence_parallel = True
    assert layer_bytes_per_token(halved, DENSE) == (34 - 2) * 64 / 2


def test_gemmas_norms_behind_attention_and_mlp_and_norms_of_queries_and_keys_count():
    shape = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4}
    gemma = Gemma3ModelProvider(**shape, num_query_groups=1, kv_channels=16, vocab_size=100)
    assert gemma.qk_layernorm
    assert layer_bytes_per_token(gemma, DENSE) == 12 * 64 + 2 * (64 + 32) + 2 * 64 + 2 * (64 + 16) + 6 * 256
    qwen = dataclasses.replace(GPT, qk_layernorm=True, tensor_model_parallel_size=2)
    plain = dataclasses.replace(GPT, tensor_model_parallel_size=2)
    added = layer_bytes_per_token(qwen, DENSE) - layer_bytes_per_token(plain, DENSE)
    assert added == 2 * (64 + 64) / 2
    llama, olmo, glm = (
        of(**shape, num_query_groups=4) for of in (LlamaModelProvider, OLMo2ModelProvider, GLM4ModelProvider)
    )
    glm.kv_channels = None
    plain = layer_bytes_per_token(llama, DENSE)
    assert layer_bytes_per_token(olmo, DENSE) == plain + 2 * (64 + 64), "as many norms, behind in place of before"
    assert layer_bytes_per_token(glm, DENSE) == plain + 4 * 64


def test_a_layers_own_input_keeps_what_was_measured_and_taken_keys_count_once():
    shape = {"num_attention_heads": 4, "num_query_groups": 1, "kv_channels": 16, "seq_length": 32, "vocab_size": 100}
    model = Gemma4ModelProvider(num_layers=1, hidden_size=64, ffn_hidden_size=256, **shape)
    plain = layer_bytes_per_token(model, LayerKind(window=8))
    taking = LayerKind(window=8, takes_keys=True)
    assert layer_bytes_per_token(model, taking) == plain - 2 * 16 * 3, "no key before its rotation, no value twice"
    model.use_double_wide_mlp = True
    assert layer_bytes_per_token(model, taking) == plain - 2 * 16 * 3 + 6 * 256
    model.hidden_size_per_layer_input = 24
    added = layer_bytes_per_token(model, LayerKind(window=8)) - plain
    of_norm, own = 2 * 64, 2 * 24  # which is counted with those of all layers
    assert added - of_norm + own == _kept_by_a_layers_own_input(model)


def _kept_by_a_layers_own_input(model):
    """Bytes a token that its backward pass needs, in bf16; weights and the norm aside."""
    model.params_dtype = torch.bfloat16
    model.perform_initialization = False
    layer = AddLayerInput(model, torch.nn.Identity)
    weights, kept = {weight.data_ptr() for weight in layer.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    output, own = (torch.randn(32, 1, size, dtype=torch.bfloat16, requires_grad=True) for size in (64, 24))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(output, own)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 32


def test_what_passes_from_layer_to_layer_is_kept_once():
    shape = {"num_attention_heads": 4, "num_query_groups": 1, "kv_channels": 16, "global_kv_channels": 20}
    sizes = {"hidden_size": 64, "ffn_hidden_size": 256, "seq_length": 32, "vocab_size": 100, "window_size": (7, 0)}
    model = Gemma4ModelProvider(num_layers=4, window_attn_skip_freq=[0, 1, 1, 0], **shape, **sizes)
    before = _bytes(model)
    model.num_kv_shared_layers, model.hidden_size_per_layer_input, model.values_are_keys = 2, 24, False
    layers = 4 * (4 * 64 + 6 * 24)
    inputs, keys = 2 * 4 * 24 + 3 * 24 + 2 * 24, 2 * 20 + (2 * 20 + 2 * 16)
    assert _bytes(model) - before == 2 * 32 * (layers + 2 * (inputs + keys))


def test_recomputation_keeps_the_inputs_of_layers_and_all_of_one_group():
    tokens, layer, boundary = 2 * 32, 32 * 64, 2 * 64
    assert _bytes(GPT, in_flight=3) == 3 * 4 * tokens * layer
    one = dataclasses.replace(GPT, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert _bytes(one, in_flight=3) == tokens * (3 * 4 * boundary + layer)
    one.recompute_num_layers = 2
    assert _bytes(one) == tokens * (2 * boundary + 2 * layer)
    one.recompute_method, one.recompute_num_layers = "block", 3
    assert _bytes(one) == tokens * (3 * boundary + layer + layer)


def test_a_token_is_in_as_many_experts_as_it_takes():
    model = MixtralModelProvider(
        num_layers=1, hidden_size=64, ffn_hidden_size=256, moe_ffn_hidden_size=256, num_attention_heads=8
    )
    dense = layer_bytes_per_token(model, DENSE)
    assert layer_bytes_per_token(model, EXPERTS) == dense - 6 * 256 + 2 * (4 * 64 + 6 * 256)


def test_shared_experts_and_latent_attention_count():
    shape = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 32}
    heads = {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12, "q_lora_rank": 20, "kv_lora_rank": 10}
    model = DeepSeekV3ModelProvider(**shape, **heads, num_attention_heads=4, num_moe_experts=4, moe_router_topk=2)
    attention, latent = 2 * (2 * 96 + 48) + 2 * 48, 4 * (20 + 10) + 2 * 8
    assert layer_bytes_per_token(model, DENSE) == 8 * 64 + attention + latent + 6 * 256
    experts = 2 * (4 * 64 + 6 * 32)
    assert layer_bytes_per_token(model, EXPERTS) == 8 * 64 + attention + latent + experts
    model.moe_shared_expert_intermediate_size = 64
    assert layer_bytes_per_token(model, EXPERTS) == 8 * 64 + attention + latent + experts + 6 * 64
    model.q_lora_rank, model.tensor_model_parallel_size = None, 2
    assert layer_bytes_per_token(model, DENSE) == 8 * 64 + attention / 2 + latent - 4 * 20 + 6 * 256 / 2
    model.sequence_parallel = True
    assert layer_bytes_per_token(model, DENSE) == (8 * 64 + attention + latent - 4 * 20 + 6 * 256) / 2


def _hybrid(**sizes):
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
    shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    others = {"num_query_groups": 2, "kv_channels": 16, "linear_attention_freq": 2, "seq_length": 192}
    return Qwen35ModelProvider(**shape, **heads, **others, bf16=True, params_dtype=torch.bfloat16, **sizes)


def _kept_by_mixers(sizes):
    """Bytes a token that the backward passes of Gated DeltaNet, and of the gate of attention, need; weights aside."""
    (model,) = (provider := _hybrid(**sizes)).provide_distributed_model(wrap_with_ddp=False)
    delta_net, attention = (layer.self_attention for layer in model.module.decoder.layers)
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    def bytes_of(function, *inputs):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(*inputs)
        return sum(storage.nbytes() for storage in kept.values()) / provider.seq_length

    hidden = torch.randn(provider.seq_length, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    heads = torch.randn(provider.seq_length, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    return bytes_of(delta_net, hidden), bytes_of(attention._apply_output_gate, heads, heads.view(-1, 1, 4, 16))


@pytest.mark.parametrize("channels", [(32, 16), (16, 40)])
def test_gated_delta_net_and_the_gate_of_attention_keep_what_was_measured(channels):
    sizes = dict(zip(("linear_key_head_dim", "linear_value_head_dim"), channels, strict=True))
    model, rest = _hybrid(**sizes), 8 * 64 + 6 * 48
    delta_net, gate = run_on_ranks(_kept_by_mixers, 1, sizes)[0]
    hidden = 2 * 64  # counted with the norm that gives it
    assert layer_bytes_per_token(model, DELTA_NET) - rest == pytest.approx(delta_net - hidden, rel=0.01)
    ungated = dataclasses.replace(model, attention_output_gate=False)
    added = layer_bytes_per_token(model, DENSE) - layer_bytes_per_token(ungated, DENSE)
    assert added == gate == 6 * 64  # with attention's output, but without the product, which is as large
    halved = dataclasses.replace(model, tensor_model_parallel_size=2)
    assert layer_bytes_per_token(halved, DELTA_NET) - 8 * 64 == (layer_bytes_per_token(model, DELTA_NET) - 8 * 64) / 2


def test_ranks_that_share_a_row_keep_their_part_of_it():
    alone, shared = dataclasses.replace(GPT), dataclasses.replace(GPT, context_parallel_size=2)
    options = {"kinds": [DENSE] * 2, "micro_batch_size": 2, "micro_batches_in_flight": 1}
    for fields in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        one, two = (activation_bytes(dataclasses.replace(model, **fields), **options) for model in (alone, shared))
        assert 2 * two == one
    assert 2 * logit_bytes(shared, micro_batch_size=2) == logit_bytes(alone, micro_batch_size=2)


def test_the_last_stage_holds_logits_of_its_share_of_the_vocabulary():
    model = dataclasses.replace(GPT, tensor_model_parallel_size=2)
    assert logit_bytes(model, micro_batch_size=2) == 8 * 2 * 32 * 50
