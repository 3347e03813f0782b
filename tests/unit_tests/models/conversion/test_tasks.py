# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Names of a built model's weights: which expert of which layer each is."""

from types import SimpleNamespace

import torch

from megatron.bridge.models.conversion.tasks import local_tasks
from megatron.bridge.models.families import family_of
from tests.rigs.ranks import run_on_ranks


def grouped_experts_on_rank(architecture):
    """The Hugging Face names of grouped experts, as Transformer Engine names them; it isn't here to build them."""
    import torch.distributed as dist

    from megatron.bridge.utils.distributed import model_parallel_groups

    with model_parallel_groups(expert_model_parallel_size=dist.get_world_size()):
        chunk, layer, experts = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
        for linear in ("linear_fc1", "linear_fc2"):
            weights = {f"weight{expert}": torch.nn.Parameter(torch.zeros(2, 2)) for expert in range(2)}
            experts.add_module(linear, torch.nn.Module())
            for name, weight in weights.items():
                getattr(experts, linear).register_parameter(name, weight)
        layer.mlp, layer.layer_number = torch.nn.Module(), 4
        layer.mlp.experts = experts
        chunk.decoder = torch.nn.Module()
        chunk.decoder.layers = torch.nn.ModuleList([layer])
        chunk.config = SimpleNamespace(
            share_embeddings_and_output_weights=False, num_moe_experts=4, expert_model_parallel_size=2
        )
        (tasks,) = local_tasks([chunk], family_of({"architectures": [architecture]}))
        return [task.hf_names for task in tasks]


def test_grouped_experts_are_counted_over_all_ranks():
    first, second = run_on_ranks(grouped_experts_on_rank, 2, "MixtralForCausalLM")
    block = "model.layers.3.block_sparse_moe.experts"
    assert first[1] == (f"{block}.1.w1.weight", f"{block}.1.w3.weight")
    assert second[0] == (f"{block}.2.w1.weight", f"{block}.2.w3.weight")
    assert second[3] == (f"{block}.3.w2.weight",)
