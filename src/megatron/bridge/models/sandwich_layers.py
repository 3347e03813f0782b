# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Layers with norms after attention and MLP, and with rotary positions of another base where a window slides.

They are made of the layers of a block spec, Core's local ones or Transformer Engine's.

Shapes: S sequence, B batch, H hidden, D channels of a head.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.utils import is_layer_window_attention

from megatron.bridge.models.layer_specs import with_attention


class NormThenAdd(torch.nn.Module):
    """Normalises what attention or MLP gives before it is added to the residual.

    Args:
        add: What adds it: Core's function of (training, fused) that returns one of (output and bias, residual,
            dropout).
        norm: The norm's class.
        config: The model's configuration.
    """

    def __init__(self, *, add: Any, norm: Any, config: TransformerConfig) -> None:
        super().__init__()
        self.add = build_module(add)
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that adds: called with (output, bias) and residual, [S, B, H] each but for the bias [H]."""
        add = self.add(training, fused)

        def norm_then_add(
            output_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            output, bias = output_and_bias
            return add((self.norm(output if bias is None else output + bias), None), residual, dropout)

        return norm_then_add


class RotaryOfEachKind(torch.nn.Module):
    """Rotary positions of two kinds of layers, in place of a model's `rotary_pos_emb`.

    Args:
        full: Those of layers that attend to everything.
        sliding: Those of layers with a sliding window.
    """

    def __init__(self, full: RotaryEmbedding, sliding: RotaryEmbedding) -> None:
        super().__init__()
        self.full = full
        self.sliding = sliding
        self.get_rotary_seq_len = full.get_rotary_seq_len

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The angles, [2, S, 1, 1, D]: of full layers, then of sliding ones. Arguments as for `RotaryEmbedding`."""
        return torch.stack([self.full(*args, **kwargs), self.sliding(*args, **kwargs)])


def give_each_kind_its_positions(model: Any, config: Any) -> None:
    """Give a model rotary positions of base `rotary_base_local`, unscaled, where a window slides.

    Args:
        model: A bare chunk of a `GPTModel` with rotary positions: those of its other layers.
        config: The provider.
    """
    sliding = rotary_of(
        model, config, config.rotary_percent, channels=config.kv_channels, base=config.rotary_base_local
    )
    model.rotary_pos_emb = RotaryOfEachKind(model.rotary_pos_emb, sliding)


def rotary_of(model: Any, config: Any, part: float, *, channels: int | None, base: float) -> RotaryEmbedding:
    """Unscaled rotary positions, otherwise like those of a model.

    Args:
        model: A bare chunk of a `GPTModel` with rotary positions.
        config: The provider.
        part: Of the channels of a head, how much turns.
        channels: Of a head.
        base: Of the frequencies.
    """
    return RotaryEmbedding(
        kv_channels=channels,
        rotary_percent=part,
        rotary_interleaved=config.rotary_interleaved,
        rotary_base=base,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=model.rotary_pos_emb.cp_group,
    )


def check_positions_of_each_kind(config: Any, kinds: Sequence[str]) -> None:
    """Refuse positions that don't have a base for each kind of layer.

    Args:
        config: The provider.
        kinds: The values of `position_embedding_type` that the family has.

    Raises:
        ValueError: Another kind, or one table of positions for all layers.
    """
    found = config.position_embedding_type
    if found not in kinds:
        raise ValueError(
            f"model.position_embedding_type={found!r}: the family has rotary positions of its own for each kind of "
            f"layer; set it to {' or '.join(map(repr, kinds))}"
        )
    if config.flash_decode:
        raise ValueError(
            "model.flash_decode=True: the family has rotary positions of its own for each kind of layer; set it to "
            "False"
        )


def _slides(config: Any, layer_number: int) -> bool:
    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)


class SelfAttentionOfItsKind(SelfAttention):
    """Attention that takes the rotary positions of its kind of layer, as `RotaryOfEachKind` gives them."""

    def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
        if _slides(config, layer_number) and getattr(config, "yarn_rotary_scaling_factor", 1.0) != 1:
            # Core multiplies cosine and sine by what YaRN's fields say, and YaRN is for the other layers.
            config = copy.copy(config)
            config.yarn_rotary_scaling_factor = 1.0
        super().__init__(config, *args, layer_number=layer_number, **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Core's, with `rotary_pos_emb` [2, S, 1, 1, D]."""
        angles = kwargs.get("rotary_pos_emb")
        if angles is not None:
            slides = _slides(self.config, self.layer_number)
            kwargs["rotary_pos_emb"] = angles[int(slides)]
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


def sandwich_spec(
    block: Any,
    config: TransformerConfig,
    *,
    attention: type[SelfAttention] = SelfAttentionOfItsKind,
    after_mlp: type[NormThenAdd] = NormThenAdd,
) -> TransformerBlockSubmodules:
    """The layers of a block with a norm after attention and MLP, and with rotary positions of each kind of layer.

    Args:
        block: The spec of Core's local layers, or of Transformer Engine's. It isn't changed.
        config: A finalized provider.
        attention: The layers' own: `SelfAttention` where rotary positions are the same in all layers.
        after_mlp: What normalises and adds what the MLP gives.

    Raises:
        ValueError: A spec of another form, which says nothing of its norms.
    """
    if not isinstance(block, TransformerBlockSubmodules) or block.layer_norm is None or block.layer_specs is None:
        raise ValueError(
            f"model.transformer_layer_spec gives a {type(block).__name__}: this family needs the layers and the final "
            "norm of a block (TransformerBlockSubmodules), such as local_layer_spec or transformer_engine_layer_spec"
        )
    options = {"norm": block.layer_norm, "config": config}
    return replace(block, layer_specs=[_sandwich(layer, options, attention, after_mlp) for layer in block.layer_specs])


def _sandwich(
    layer: ModuleSpec, options: dict[str, Any], attention: type[SelfAttention], after_mlp: type[NormThenAdd]
) -> ModuleSpec:
    parts = with_attention(layer, attention).submodules
    parts = replace(
        parts,
        self_attn_bda=ModuleSpec(module=NormThenAdd, params={"add": parts.self_attn_bda, **options}),
        mlp_bda=ModuleSpec(module=after_mlp, params={"add": parts.mlp_bda, **options}),
    )
    return replace(layer, submodules=parts)
