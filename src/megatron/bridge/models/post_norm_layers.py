# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Layers with norms after attention and MLP alone, and with norms over all heads' queries and over all heads' keys.

They are made of the layers of a block spec, Core's local ones or Transformer Engine's.

Shapes: S sequence, B batch, N heads of this tensor-parallel rank, D channels of a head.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron.bridge.models.layer_specs import has_transformer_engine, replace_norms
from megatron.bridge.models.sandwich_layers import SelfAttentionOfItsKind, sandwich_spec


class _RMSNormOverRanks(torch.autograd.Function):
    """RMSNorm of a row whose parts tensor-parallel ranks hold. Keeps its input, and one number a row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, eps: float, group: Any) -> torch.Tensor:
        """As `ProjectionNorm`, of [S, B, N * D]."""
        squares = rows.float().pow(2).sum(-1, keepdim=True)
        if group.size() > 1:
            dist.all_reduce(squares, group=group)
        ctx.channels, ctx.group = rows.shape[-1] * group.size(), group
        scale = torch.rsqrt(squares / ctx.channels + eps)
        ctx.save_for_backward(rows, weight, scale)
        return (weight * (rows.float() * scale)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradients of the rank's part and of its weight."""
        rows, weight, scale = ctx.saved_tensors
        normed, gradient = rows.float() * scale, gradient.float()
        of_normed = gradient * weight
        along = (of_normed * normed).sum(-1, keepdim=True)
        if ctx.group.size() > 1:
            dist.all_reduce(along, group=ctx.group)
        of_rows = scale * (of_normed - normed * (along / ctx.channels))
        of_weight = (gradient * normed).flatten(0, -2).sum(0)
        return of_rows.to(rows.dtype), of_weight.to(weight.dtype), None, None


class ProjectionNorm(torch.nn.Module):
    """An RMSNorm over the channels of all heads, which tensor-parallel ranks share.

    Args:
        config: The model's configuration.
        num_heads: N.
        group: The tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, *, num_heads: int, group: Any) -> None:
        super().__init__()
        channels = num_heads * (config.kv_channels or config.hidden_size // config.num_attention_heads)
        self.eps, self.group = config.layernorm_epsilon, group
        self.weight = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Normalise [S, B, N, D] over the heads of all ranks; same shape and dtype."""
        return _RMSNormOverRanks.apply(heads.flatten(-2), self.weight, self.eps, self.group).view(heads.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, cut over the tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class _NormsProjections(SelfAttention):
    """Attention whose queries and keys are normalised over all heads, before the rotary positions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = self.pg_collection.tp
        # Not q_layernorm: Core adds the gradients of weights of that name up over tensor-parallel ranks.
        self.q_norm = ProjectionNorm(self.config, num_heads=self.num_attention_heads_per_partition, group=group)
        self.k_norm = ProjectionNorm(self.config, num_heads=self.num_query_groups_per_partition, group=group)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As Core's, normalised."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        return self.q_norm(query), self.k_norm(key), *others


class NormedAttention(_NormsProjections):
    """In a model with the same rotary positions in all layers."""


class NormedAttentionOfItsKind(_NormsProjections, SelfAttentionOfItsKind):
    """In a model with rotary positions of each kind of layer."""


def check_projections_can_be_normed(config: Any) -> None:
    """Refuse what would normalise other channels than those of all heads, each once.

    Args:
        config: The provider.

    Raises:
        ValueError: Ranks would hold the same keys, or query and key come in one tensor.
    """
    groups, ranks = config.num_query_groups or config.num_attention_heads, config.tensor_model_parallel_size
    if groups % ranks:
        raise ValueError(
            f"model.tensor_model_parallel_size={ranks} with model.num_query_groups={groups}: keys are normalised over "
            "all groups, and Core gives a group to several ranks; choose a size that divides the groups"
        )
    for name in ("qk_layernorm", "fused_single_qkv_rope"):
        if getattr(config, name, False):
            raise ValueError(
                f"model.{name}=True: the family normalises queries and keys over all heads instead of each head's; "
                "set it to False"
            )


def post_norm_spec(block: Any, config: TransformerConfig, *, attention: type[SelfAttention]) -> Any:
    """The layers of a block with norms after attention and MLP in place of those before them.

    Args:
        block: The spec of Core's local layers, or of Transformer Engine's. It isn't changed.
        config: A finalized provider.
        attention: `NormedAttention` or `NormedAttentionOfItsKind`.

    Raises:
        ValueError: As for `sandwich_spec`.
    """
    made = sandwich_spec(block, config, attention=attention)
    assert isinstance(made, TransformerBlockSubmodules) and made.layer_specs is not None
    return replace(made, layer_specs=[_without_norms_before(layer) for layer in made.layer_specs])


def _without_norms_before(layer: ModuleSpec) -> ModuleSpec:
    parts = replace(layer.submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
    if has_transformer_engine():  # whose layers have the norm inside the linear layer that follows
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELayerNormColumnParallelLinear

        parts = replace(parts, self_attention=copy.deepcopy(parts.self_attention), mlp=copy.deepcopy(parts.mlp))
        for part in (parts.self_attention, parts.mlp):
            replace_norms(part, (TELayerNormColumnParallelLinear,), TEColumnParallelLinear)
    return replace(layer, submodules=parts)
