# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import torch

from megatron.bridge.models.gpt_oss import GPTOSSModelProvider
from tests.rigs.ranks import run_on_ranks


def _marks_on_rank():
    provider = GPTOSSModelProvider(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=8,
        moe_ffn_hidden_size=8,
        kv_channels=4,
        num_attention_heads=4,
        num_query_groups=2,
        num_moe_experts=4,
        moe_router_topk=2,
        vocab_size=32,
        seq_length=16,
        params_dtype=torch.float32,
        tensor_model_parallel_size=2,
        expert_model_parallel_size=2,
        sequence_parallel=True,
    )
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
    marks = ("tensor_model_parallel", "partition_dim", "sequence_parallel")
    return {name: [getattr(one, mark, None) for mark in marks] for name, one in chunk.named_parameters()}


def test_what_each_rank_has_a_part_of_is_counted_there_and_summed_nowhere_else():
    """Sinks of a rank's heads, and output biases of its own experts; the router's and attention's are on all ranks."""
    for marks in run_on_ranks(_marks_on_rank, 2):
        assert marks["decoder.layers.0.self_attention.core_attention.softmax_offset"][:2] == [True, 0]
        for expert in range(2):
            bias = marks[f"decoder.layers.0.mlp.experts.local_experts.{expert}.linear_fc2.bias"]
            assert bias == [True, 0, False]
        for name in ("self_attention.linear_proj.bias", "mlp.router.bias", "mlp.router.weight"):
            is_cut, _, is_summed = marks[f"decoder.layers.0.{name}"]
            assert not is_cut and is_summed
