# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Adam over state that isn't stored in FP32: piece by piece, each widened, stepped on and rounded within the cache.

The arithmetic is that of torch's fused kernel in FP32. A piece ends at a multiple of the kernel's vectors, so each
element is computed as it is in one call for the whole tensor (see `adam.py`).
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron.bridge.utils import device

Finish = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a piece of gradients and room for it in FP32, what Adam reads."""
PIECE_ELEMENTS = 1 << 16
"""For each thread: its parts of master, gradient and moments take 1 MB in FP32. A multiple of the alignment."""


@torch.no_grad()
def step_in_pieces(
    lists: dict[str, list[torch.Tensor]],
    options: dict[str, Any],
    finish: Finish | None = None,
) -> None:
    """Take one step of AdamW on each master.

    Args:
        lists: For each kind (`master`, `gradient`, `exp_avg`, `exp_avg_sq`, `step`) one tensor for each master.
            Masters and steps are FP32, the others FP32 or 16-bit. All are on the host and contiguous; all but the
            gradients are changed, and moments are rounded to nearest even.
        options: The param group, which has torch's options of AdamW.
        finish: None: gradients are widened.
    """
    size = piece_elements()
    kinds = ("master", "gradient", "exp_avg", "exp_avg_sq")
    with device.bypass_simulation():
        rooms = rooms_for(len(kinds) - 1)
        for *stored, step in zip(*(lists[kind] for kind in (*kinds, "step")), strict=True):
            step += 1
            for master, *pieces in zip(*(tensor.view(-1).split(size) for tensor in stored), strict=True):
                step_on_piece(master, pieces, step, options, finish, rooms=rooms)


def piece_elements() -> int:
    """Elements of a piece, for the threads of this one."""
    return PIECE_ELEMENTS * torch.get_num_threads()


def rooms_for(count: int) -> list[torch.Tensor]:
    """FP32 memory for so many pieces. Pages that nobody writes take no memory."""
    return [torch.empty(piece_elements(), device="cpu", dtype=torch.float32) for _ in range(count)]


def step_on_piece(
    master: torch.Tensor,
    stored: list[torch.Tensor],
    step: torch.Tensor,
    options: dict[str, Any],
    finish: Finish | None = None,
    *,
    rooms: list[torch.Tensor],
) -> None:
    """Take a step on a piece.

    Args:
        master: FP32, [N].
        stored: Its gradient and both moments, FP32 or 16-bit, [N]. Moments are changed.
        step: The counter, incremented already.
        options: The param group.
        finish: See `step_in_pieces`.
        rooms: FP32, at least [N], one for each of `stored`.
    """
    widened_by = (finish or _in_fp32, _in_fp32, _in_fp32)
    wide = [widen(piece, room[: piece.numel()]) for widen, piece, room in zip(widened_by, stored, rooms, strict=True)]
    _step_on([master, *wide], step, options)
    for piece, moment in zip(stored[1:], wide[1:], strict=True):
        if moment is not piece:
            piece.copy_(moment)


def _in_fp32(piece: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """The piece itself, or its values in the room."""
    return piece if piece.dtype == torch.float32 else room.copy_(piece)


def _step_on(wide: list[torch.Tensor], step: torch.Tensor, options: dict[str, Any]) -> None:
    master, gradient, exp_avg, exp_avg_sq = wide
    beta1, beta2 = options["betas"]
    torch._fused_adamw_(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=options["maximize"],
    )
