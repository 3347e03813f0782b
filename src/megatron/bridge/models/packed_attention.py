# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What keeps the samples of a packed row apart: a mask for Core's own attention, boundaries for Transformer Engine's.

Shapes: B rows, S sequence, N samples of the row with the most of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.utils import unwrap_model

from megatron.bridge.models.context_parallel import context_ranks
from megatron.bridge.utils.device import current_device


def attention_arguments(model: torch.nn.Module, cu_seqlens: torch.Tensor, *, seq_length: int) -> dict[str, Any]:
    """The arguments of a model's forward pass that keep packed samples apart.

    Args:
        model: This rank's chunk, wrapped or not, that `check_samples_are_kept_apart` has passed.
        cu_seqlens: [B, N + 1] int32, on the host: 0 and the end of each sample; shorter rows repeat S.
        seq_length: S.

    Returns:
        `attention_mask` for Core's own attention; `packed_seq_params`, and no mask, for another.
    """
    if _takes_a_mask(model):
        return {"attention_mask": separate_causal_mask(cu_seqlens.to(current_device()), seq_length=seq_length)}
    return {"attention_mask": None, "packed_seq_params": packed_seq_params(cu_seqlens[0], seq_length=seq_length)}


def separate_causal_mask(cu_seqlens: torch.Tensor, *, seq_length: int) -> torch.Tensor:
    """The mask that lets each position see those of its own sample up to itself.

    Args:
        cu_seqlens: [B, N + 1], as above; what follows the last sample is a sample of its own.
        seq_length: S.

    Returns:
        [B, 1, S, S] bool, on the device of `cu_seqlens`: True where attention is masked out, as Core takes it.
    """
    positions = torch.arange(seq_length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sample_of = torch.searchsorted(cu_seqlens, positions.expand(len(cu_seqlens), -1).contiguous(), right=True)
    same = sample_of[:, :, None] == sample_of[:, None, :]
    causal = positions[:, None] >= positions[None, :]
    return ~(same & causal)[:, None]


def packed_seq_params(cu_seqlens: torch.Tensor, *, seq_length: int) -> PackedSeqParams:
    """The boundaries of one row for Transformer Engine's attention and for rotary positions that restart.

    Args:
        cu_seqlens: [N + 1], on the host.
        seq_length: S; the padding up to it is a sample of its own.
    """
    ends = torch.unique(torch.cat([cu_seqlens, cu_seqlens.new_tensor([seq_length])]))
    longest = int((ends[1:] - ends[:-1]).max())
    ends = ends.to(current_device())
    # Shared among ranks, Transformer Engine wants to be told that the samples' padding counts among their positions.
    padded = ends if context_ranks()[1] > 1 else None
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest,
        cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded,
    )  # fmt: skip


def check_samples_are_kept_apart(chunks: Sequence[torch.nn.Module], *, micro_batch_size: int) -> None:
    """Refuse a model that would look across the samples of a packed row.

    Args:
        chunks: This rank's part of the model.
        micro_batch_size: Rows of a micro-batch.

    Raises:
        ValueError: Core's attention would put another mask in place of ours, or Transformer Engine's would take rows
            for one.
    """
    for chunk in chunks:
        attentions = [one for one in _attentions(chunk) if isinstance(one, DotProductAttention)]
        if not _takes_a_mask(chunk) and micro_batch_size != 1:
            raise ValueError(
                f"train.micro_batch_size={micro_batch_size} with packed samples: Transformer Engine's attention takes "
                "one row at a time; set train.micro_batch_size=1 and pack longer rows"
            )
        for attention in attentions:
            softmax = attention.scale_mask_softmax
            if softmax.window_size is not None:
                raise ValueError(
                    f"model.window_size={softmax.window_size} with packed samples: Core's own attention puts the "
                    "window's mask in place of theirs; switch packing off or use Transformer Engine"
                )
            if softmax.scaled_masked_softmax_fusion and softmax.input_in_float16:
                raise ValueError(
                    "model.masked_softmax_fusion=True with packed samples: Core's fused kernel knows only the causal "
                    "mask; set model.masked_softmax_fusion=false"
                )


def _takes_a_mask(model: torch.nn.Module) -> bool:
    """Whether a chunk's attention is Core's own, or there is none: what stands in for it takes a mask too."""
    return all(isinstance(attention, DotProductAttention) for attention in _attentions(model))


def _attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What weighs keys in the layers of a chunk that have it: Core's own attention or Transformer Engine's."""
    layers = unwrap_model(model).decoder.layers
    found = [getattr(layer.self_attention, "core_attention", None) for layer in layers]
    return [attention for attention in found if attention is not None]
