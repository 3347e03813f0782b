# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The formula for activations: the paper's own figure, how layouts share it, and what recomputation leaves."""

import dataclasses

from megatron.bridge.models.activation_memory import activation_bytes, layer_bytes_per_token, logit_bytes
from megatron.bridge.models.deepseek_v3 import DeepSeekV3ModelProvider
from megatron.bridge.models.gemma3 import Gemma3ModelProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.mixtral import MixtralModelProvider

GPT = GPTModelProvider(
    num_layers=4, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, seq_length=32, vocab_size=100
)


def _bytes(model, *, layers=4, in_flight=1):
    return activation_bytes(model, moe_layers=[False] * layers, micro_batch_size=2, micro_batches_in_flight=in_flight)


def test_a_layer_of_the_papers_gpt_keeps_34_bytes_a_channel_less_its_dropout_masks():
    assert layer_bytes_per_token(GPT, is_moe=False) == (34 - 2) * 64


def test_tensor_parallel_ranks_share_all_but_the_norms_and_with_sequence_parallelism_these_too():
    halved = dataclasses.replace(GPT, tensor_model_parallel_size=2)
    assert layer_bytes_per_token(halved, is_moe=False) == (8 + 24 / 2) * 64
    halved.sequence_parallel = True
    assert layer_bytes_per_token(halved, is_moe=False) == (34 - 2) * 64 / 2


def test_gemmas_norms_behind_attention_and_mlp_and_norms_of_queries_and_keys_count():
    shape = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4}
    gemma = Gemma3ModelProvider(**shape, num_query_groups=1, kv_channels=16, vocab_size=100)
    assert gemma.qk_layernorm
    assert layer_bytes_per_token(gemma, is_moe=False) == 12 * 64 + 2 * (64 + 32) + 2 * 64 + 2 * (64 + 16) + 6 * 256
    qwen = dataclasses.replace(GPT, qk_layernorm=True, tensor_model_parallel_size=2)
    plain = dataclasses.replace(GPT, tensor_model_parallel_size=2)
    added = layer_bytes_per_token(qwen, is_moe=False) - layer_bytes_per_token(plain, is_moe=False)
    assert added == 2 * (64 + 64) / 2


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
    dense = layer_bytes_per_token(model, is_moe=False)
    assert layer_bytes_per_token(model, is_moe=True) == dense - 6 * 256 + 2 * (4 * 64 + 6 * 256)


def test_shared_experts_and_latent_attention_count():
    shape = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 32}
    heads = {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12, "q_lora_rank": 20, "kv_lora_rank": 10}
    model = DeepSeekV3ModelProvider(**shape, **heads, num_attention_heads=4, num_moe_experts=4, moe_router_topk=2)
    attention, latent = 2 * (2 * 96 + 48) + 2 * 48, 4 * (20 + 10) + 2 * 8
    assert layer_bytes_per_token(model, is_moe=False) == 8 * 64 + attention + latent + 6 * 256
    experts = 2 * (4 * 64 + 6 * 32)
    assert layer_bytes_per_token(model, is_moe=True) == 8 * 64 + attention + latent + experts
    model.moe_shared_expert_intermediate_size = 64
    assert layer_bytes_per_token(model, is_moe=True) == 8 * 64 + attention + latent + experts + 6 * 64
    model.q_lora_rank, model.tensor_model_parallel_size = None, 2
    assert layer_bytes_per_token(model, is_moe=False) == 8 * 64 + attention / 2 + latent - 4 * 20 + 6 * 256 / 2
    model.sequence_parallel = True
    assert layer_bytes_per_token(model, is_moe=False) == (8 * 64 + attention + latent - 4 * 20 + 6 * 256) / 2


def test_the_last_stage_holds_logits_of_its_share_of_the_vocabulary():
    model = dataclasses.replace(GPT, tensor_model_parallel_size=2)
    assert logit_bytes(model, micro_batch_size=2) == 8 * 2 * 32 * 50
