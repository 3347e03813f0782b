# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gradients that crossed to the host before they were scaled and clipped, and what is left to do to them there.

The host multiplies as the device would: by the same factors, in the same order and dtype. Each product is rounded once,
so the bits are the same.
"""

import torch

from megatron.bridge.offload_engine.host_memory import Slab


class UnfinishedGradients:
    """A bucket's gradients as they were reduced, and the factors that Adam's are still to be multiplied by."""

    def __init__(self, slab: Slab, *, in_fp32: bool, stored_as: torch.dtype) -> None:
        """Note where they are.

        Args:
            slab: On the host, in the dtype of the reduction.
            in_fp32: The device widens gradients before it scales and clips them.
            stored_as: The dtype that they are rounded to before Adam reads them in FP32.
        """
        self.slab = slab
        self.factors: list[float] = []
        self._dtype = torch.float32 if in_fp32 else slab.dtype
        self._stored_as = stored_as

    @property
    def are_finished(self) -> bool:
        """Whether they are what Adam would be given."""
        return not self.factors and self.slab.dtype == self._stored_as

    def scaled(self, piece: torch.Tensor) -> torch.Tensor:
        """A piece of the slab as the device would have it, in a tensor of its own or the piece itself."""
        values = piece.to(self._dtype)
        for factor in self.factors:
            values = values * factor
        return values

    def finish(self, piece: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """What Adam reads in place of a piece of the slab.

        Args:
            piece: Of `slab`; stays as it is.
            room: FP32, of the same shape; overwritten.
        """
        if self._dtype != torch.float32:
            return room.copy_(self.scaled(piece).to(self._stored_as))
        room.copy_(piece)
        for factor in self.factors:
            room.mul_(factor)
        return room if self._stored_as == torch.float32 else room.copy_(room.to(self._stored_as))
