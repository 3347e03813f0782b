# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Context parallelism: which part of each row a rank works on, and which attention can share one.

A sample is cut into 2 x CP chunks, and rank r gets chunks r and 2 x CP - 1 - r: under a causal mask a late token costs
more than an early one, and so every rank costs the same. Core cuts rotary positions in the same way, and Transformer
Engine's attention expects it.

Shapes: B rows, S sequence, N samples of the row with the most of them, CP ranks that share a row.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron.bridge.models.layer_specs import why_local
from megatron.bridge.utils.replaced import replaced

CUT = ("tokens", "labels", "loss_mask", "position_ids")
"""What of a micro-batch is cut along the sequence."""


def context_ranks() -> tuple[int, int]:
    """(this rank among those that share its rows, how many share them); (0, 1) without process groups."""
    group = parallel_state.get_context_parallel_group(check_initialized=False)
    return (0, 1) if group is None else (group.rank(), group.size())


def positions_of_rank(ends: torch.Tensor, *, rank: int, size: int) -> torch.Tensor:
    """The positions of a row that one rank works on.

    Args:
        ends: [N + 1] integers, on the host: 0 and the end of each sample, the last one S; an end may be repeated.
        rank: Which of the ranks.
        size: Ranks that share the row.

    Returns:
        [S / size] int64, on the host: of each sample the two chunks of the rank, as Transformer Engine's
        `thd_get_partitioned_indices` gives them.

    Raises:
        ValueError: A sample can't be cut into equal chunks.
    """
    bounds = ends.tolist()
    parts = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        chunk, left = divmod(end - start, 2 * size)
        if left:
            raise ValueError(
                f"a sample takes {end - start} positions of a row, which model.context_parallel_size={size} can't "
                f"share: expected a multiple of {2 * size}; set pad_seq_to_mult={2 * size} where samples are packed"
            )
        parts += [torch.arange(start + at * chunk, start + (at + 1) * chunk) for at in (rank, 2 * size - 1 - rank)]
    return torch.cat(parts)


def cut_for_this_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """The micro-batch with this rank's part of each row; itself without context parallelism.

    Args:
        batch: `CUT`, each [B, S] on one device or None; `attention_mask` None; `cu_seqlens` [B, N + 1] on the host,
            or None.

    Returns:
        `CUT` as [B, S / CP]; all else, `cu_seqlens` too, as it was: attention counts in positions of the whole row.

    Raises:
        ValueError: A sample can't be cut, or there is a mask.
    """
    rank, size = context_ranks()
    if size == 1:
        return batch
    if batch.get("attention_mask") is not None:
        raise ValueError(
            f"the data has an attention_mask, and model.context_parallel_size={size}: ranks that share a row know the "
            "causal mask alone; leave the mask out, or set model.context_parallel_size=1"
        )
    found = {name: batch[name] for name in CUT if batch.get(name) is not None}
    length, device = (tensor := next(iter(found.values()))).shape[1], tensor.device
    whole = torch.tensor([[0, length]])
    ends = whole if batch.get("cu_seqlens") is None else batch["cu_seqlens"]
    last = ends.new_full((len(ends), 1), length)  # what follows the last sample is a sample of its own
    rows = [positions_of_rank(row, rank=rank, size=size) for row in torch.cat([ends, last], dim=1)]
    index = torch.stack(rows).to(device)
    return batch | {name: tensor.take_along_dim(index.expand(len(tensor), -1), 1) for name, tensor in found.items()}


def check_attention_can_share_rows(model: Any) -> None:
    """The layers that the model will get can share a row among ranks. Which options fit is a rule's to say.

    Args:
        model: The provider. What a layer spec of its own has is seen when it is built.

    Raises:
        ValueError: They can't.
    """
    reason = why_local(model)
    if model.context_parallel_size > 1 and reason is not None:
        raise ValueError(
            f"model.context_parallel_size={model.context_parallel_size} needs Transformer Engine's attention, and this "
            f"run has Core's local one ({reason}), which sees the tokens of its own rank alone: set "
            "model.context_parallel_size=1, and shorten model.seq_length or raise model.tensor_model_parallel_size "
            "instead"
        )


def check_holds_whole_rows(model: Any, *, doing: str) -> None:
    """Refuse what reads one token after the other with a model whose ranks share rows.

    Raises:
        ValueError: They do.
    """
    if model.context_parallel_size > 1:
        raise ValueError(
            f"{doing} with model.context_parallel_size={model.context_parallel_size}: the ranks of a row would each "
            "hold a part of it; load the model with context_parallel_size=1"
        )


def building_without_context_parallelism() -> Any:
    """A context in which Core's local attention can be built at any context parallel size, to be measured, not run."""
    build = DotProductAttention.__init__

    def build_alone(self: DotProductAttention, config: Any, *args: Any, **kwargs: Any) -> None:
        with replaced(config, context_parallel_size=1):
            build(self, config, *args, **kwargs)

    return replaced(DotProductAttention, __init__=build_alone)
