# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The gated delta rule and the short convolution before it, in plain torch: what Gated DeltaNet layers compute.

After Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024). A head keeps a state S, a matrix
from keys to values. At each position the state decays, and what it then says of the key is moved towards the value:

    S' = exp(g) S        S = S' + k u^T   with   u = beta (v - S'^T k)        output = S^T q

Chunks of positions are computed at once. Within one, the u are the solution of a triangular system; from one to the
next goes the state alone. Neither reaches from one sample of a packed row into the next.

Shapes: B batch, S sequence, H heads, K and V channels of a key and of a value, N chunks, C positions of a chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK = 64
"""Positions of a chunk."""


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    sample_of: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of all positions, and the state after the last. Everything is float32.

    Args:
        query: [B, H, S, K].
        key: [B, H, S, K].
        value: [B, H, S, V].
        decay: [B, H, S], g above: 0 or less.
        beta: [B, H, S], between 0 and 1.
        state: [B, H, K, V] before the first position; None: zeros.
        sample_of: [B, S], a number for each position that is the same within a sample; None: each row is one.

    Returns:
        Outputs [B, H, S, V], and the state [B, H, K, V].
    """
    length, chunk = query.shape[2], min(CHUNK, query.shape[2])
    reach = _reach_of(_in_chunks(decay, chunk), None if sample_of is None else _sample_chunks(sample_of, chunk))
    query, key, value, beta = (_in_chunks(one, chunk) for one in (query, key, value, beta[..., None]))
    weighted = beta * key
    system = weighted @ key.transpose(-1, -2) * reach.within
    sides = torch.cat([beta * value, weighted * reach.of_state], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    updates, of_state = solved.split([value.shape[-1], key.shape[-1]], -1)
    scores, query, key = query @ key.transpose(-1, -2) * reach.within, query * reach.of_state, key * reach.to_end
    if state is None:
        state = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for n in range(value.shape[2]):
        update = updates[:, :, n] - of_state[:, :, n] @ state
        outputs.append(query[:, :, n] @ state + scores[:, :, n] @ update)
        state = reach.across[:, :, n] * state + key[:, :, n].transpose(-1, -2) @ update
    return torch.cat(outputs, 2)[:, :, :length], state


class _Reach(NamedTuple):
    """What is left of something after the decay in between; 0 where it is of another sample, or later."""

    within: torch.Tensor
    """[B, H, N, C, C]: of a position, at each position of its chunk."""
    of_state: torch.Tensor
    """[B, H, N, C, 1]: of the state before the chunk, at each position."""
    to_end: torch.Tensor
    """[B, H, N, C, 1]: of a position, at the chunk's last."""
    across: torch.Tensor
    """[B, H, N, 1, 1]: of the state before the chunk, after it."""


def _reach_of(decay: torch.Tensor, sample_of: torch.Tensor | None) -> _Reach:
    """Args: decay [B, H, N, C]; sample_of [B, 1, N, C] or None."""
    total = decay.double().cumsum(-1)  # the differences of long sums would keep few digits in float32
    last = total[..., -1:]
    size = decay.shape[-1]
    reached = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril()
    within, of_state, to_end, across = total[..., :, None] - total[..., None, :], total, last - total, last
    if sample_of is not None:
        at_end = sample_of[..., -1:]
        before = torch.cat([sample_of[:, :, :1, :1], at_end[:, :, :-1]], 2)
        reached = reached & (sample_of[..., :, None] == sample_of[..., None, :])
        of_state = of_state.masked_fill(sample_of != before, -math.inf)
        to_end = to_end.masked_fill(sample_of != at_end, -math.inf)
        across = across.masked_fill(at_end != before, -math.inf)
    # Masked before exp: what is to come would grow without bound, and so would its gradient.
    within = within.masked_fill(~reached, -math.inf)
    within, of_state, to_end, across = (one.float().exp() for one in (within, of_state, to_end, across))
    return _Reach(within, of_state[..., None], to_end[..., None], across[..., None])


def _in_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """[B, H, S, ...] as [B, H, N, C, ...], with zeros at the end: they change neither outputs nor state."""
    missing = -x.shape[2] % chunk
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], 2)
    return x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:])


def _sample_chunks(sample_of: torch.Tensor, chunk: int) -> torch.Tensor:
    """[B, S] as [B, 1, N, C]; what is added at the end counts as the last sample, whose state must stay."""
    missing = -sample_of.shape[1] % chunk
    padded = torch.cat([sample_of, sample_of[:, -1:].expand(-1, missing)], 1)
    return padded.reshape(len(sample_of), 1, -1, chunk)


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, *, before: torch.Tensor | None = None, sample_of: torch.Tensor | None = None
) -> torch.Tensor:
    """Each channel's weighted sum of its last positions, the present one included, in float32.

    Args:
        x: [B, S, channels].
        weight: [channels, 1, width]; the last column is the present position's.
        before: [B, width - 1, channels], what went before; None: zeros.
        sample_of: As for `gated_delta_rule`: other samples count as zeros.

    Returns:
        [B, S, channels] float32.
    """
    length, width = x.shape[1], weight.shape[-1]
    columns = weight[:, 0].float().unbind(-1)
    if before is None:
        before = x.new_zeros(len(x), width - 1, x.shape[2])
    x = torch.cat([before, x], 1).float()
    total = x[:, width - 1 :] * columns[-1]
    if sample_of is not None:
        none = sample_of.new_full((len(sample_of), width - 1), -1)
        all_samples = torch.cat([none, sample_of], 1)
    for place in range(width - 1):
        earlier = x[:, place : place + length] * columns[place]
        if sample_of is not None:
            earlier = earlier * (all_samples[:, place : place + length] == sample_of)[..., None]
        total = total + earlier
    return total


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """A vector of length 1 in the direction of the last axis, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def sample_numbers(
    attention_mask: torch.Tensor | None, boundaries: torch.Tensor | None, *, batch: int, length: int
) -> torch.Tensor | None:
    """A number for each position that is the same within a sample; None where each row is one.

    Args:
        attention_mask: [B or 1, 1, S, S] bool, True where attention is masked out: a sample begins where a position
            doesn't see the one before it.
        boundaries: [N + 1], where samples begin and where the last ends, in place of the mask.
        batch: B.
        length: S.
    """
    if boundaries is not None:
        positions = torch.arange(length, dtype=boundaries.dtype, device=boundaries.device)
        return torch.searchsorted(boundaries, positions, right=True).expand(batch, -1)
    if attention_mask is None:
        return None
    begins = attention_mask[:, 0].diagonal(-1, dim1=-2, dim2=-1)
    return F.pad(begins.long().cumsum(-1), (1, 0)).expand(batch, -1)
