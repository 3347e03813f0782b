# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Attention for tests of context parallelism: each rank gathers the keys and values of its row from all ranks.

It stands in for Transformer Engine's, which needs a GPU: the same arguments, the same chunks of a row on each rank, the
same boundaries of packed samples. Shapes: S positions of a row, B rows, A heads, D channels of a head; CP ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


class _Gather(torch.autograd.Function):
    """[S / CP, …] of each rank to [S, …], in the order of ranks; gradients are added up over them."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient.chunk(group.size())[group.rank()]


class GatheredAttention(torch.nn.Module):
    """Causal attention over the whole row, of this rank's part of the queries."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[S / CP, B, A, D] to [S / CP, B, A x D]; packed, without B."""
        from megatron.bridge.models.context_parallel import context_ranks, positions_of_rank

        rank, size = context_ranks()
        if packed_seq_params is not None:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            ends = packed_seq_params.cu_seqlens_q.cpu()
            assert size == 1 or packed_seq_params.cu_seqlens_q_padded is packed_seq_params.cu_seqlens_q
        else:
            ends = torch.tensor([0, len(query) * size])
        places = [positions_of_rank(ends, rank=one, size=size) for one in range(size)]
        back = torch.cat(places).argsort()
        own, whole = places[rank], torch.arange(len(query) * size)
        sample = torch.searchsorted(ends[1:], whole, right=True)
        seen = (own[:, None] >= whole[None, :]) & (sample[own][:, None] == sample[None, :])
        groups = query.shape[2] // key.shape[2]
        key, value = (_Gather.apply(one)[back].repeat_interleave(groups, dim=2) for one in (key, value))
        scores = torch.einsum("sbad,tbad->bast", query, key).float() / query.shape[3] ** 0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(value.dtype)
        mixed = torch.einsum("bast,tbad->sbad", weights, value).flatten(2)
        return mixed.squeeze(1) if packed_seq_params is not None else mixed


def gathered_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Core's local layers with this attention."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron.bridge.models.layer_specs import local_layer_spec, replace_norms

    block = local_layer_spec(config, vp_stage)
    replace_norms(block, (DotProductAttention,), GatheredAttention)
    return block
