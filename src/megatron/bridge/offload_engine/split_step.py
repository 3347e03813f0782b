# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A bucketed step whose masters are stored as 16-bit rests between steps (see `split_masters.py`).

Weights come down and return on the stream on which masters return otherwise. In a step it waits for nothing: the host
has waited for the gradients, and so for all that was queued before they came down. Where gradients came down earlier,
the overlapped step has let the stream wait for the current one.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from megatron.bridge.offload_engine.late_reads import ReadsLate
from megatron.bridge.offload_engine.piecewise_adam import piece_elements
from megatron.bridge.offload_engine.step import BucketedStep
from megatron.bridge.offload_engine.weight_transit import NUM_BUFFERS, Transit


class SplitStep(ReadsLate, BucketedStep):
    """Overrides that split masters; made by `split_masters_of`. Who reads state between steps finds them in FP32."""

    transit: Transit
    _is_stepping = False

    @property
    def split_masters(self) -> list[torch.Tensor]:
        """Those that are stored as rests between steps."""
        return [master for bucket in self._buckets if bucket.split_masters is not None for master in bucket.masters]

    @property
    def transit_bytes(self) -> int:
        """Host memory through which weights cross, from the first step on."""
        sizes = (max(bucket.entry_sizes) for bucket in self._buckets if bucket.split_masters is not None)
        return NUM_BUFFERS * torch.bfloat16.itemsize * min(piece_elements(), max(sizes, default=0))

    def prepare_read(self) -> None:
        """Let masters be in FP32, unless a step is reading."""
        super().prepare_read()
        if not self._is_stepping:
            for bucket in vars(self).get("_buckets", ()):
                if bucket.split_masters is not None:
                    bucket.split_masters.join()

    def state_dict(self) -> dict[str, Any]:
        """As torch's.

        Raises:
            RuntimeError: Weights changed after the last step, and their masters weren't written since.
        """
        self.prepare_read()
        for bucket in self._buckets:
            if bucket.split_masters is not None:
                bucket.split_masters.raise_if_lost()
        return super().state_dict()

    @contextlib.contextmanager
    def _within_a_step(self) -> Iterator[None]:
        """Within the context reads are the step's own."""
        before, self._is_stepping = self._is_stepping, True
        try:
            yield
        finally:
            self._is_stepping = before

    def _init_sub_optimizers(self) -> None:
        super()._init_sub_optimizers()
        self.transit.stream = self._h2d_stream
        for bucket in self._buckets:
            if bucket.params[0].dtype == torch.bfloat16 and bucket.split_masters is None:
                bucket.split_through(self.transit)

    def _step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except BaseException:
            self._is_stepping = False  # who reads masters after a failed step finds them in FP32 too
            raise

    step: Any = _step
    step.hooked = True  # torch runs hooks of a step in the one that is overridden

    def _sync_hdo_param_groups_to_sub_optimizers(self) -> None:
        with self._within_a_step():
            super()._sync_hdo_param_groups_to_sub_optimizers()

    def _set_sub_optimizer_grads(self) -> None:
        self._is_stepping = True  # until the state is synced, at the step's end
        super()._set_sub_optimizer_grads()

    def _sync_sub_optimizers_state_to_hdo(self) -> None:
        with self._within_a_step():
            super()._sync_sub_optimizers_state_to_hdo()
        self._is_stepping = False


def split_masters_of(hybrid: Any) -> None:
    """Let a hybrid optimizer store the masters of its BF16 parameters on the host as 16-bit rests.

    Args:
        hybrid: Built by Core, with the repairs, in precision-aware mode. It has no state yet.

    Raises:
        RuntimeError: Its step isn't the one in buckets, or a parameter on the host is neither BF16 nor FP32.
    """
    off = "set optimizer.optimizer_split_masters=false"
    if not hasattr(hybrid, "_buckets"):
        raise RuntimeError(
            f"optimizer.optimizer_split_masters=true, but {type(hybrid).__name__} of this megatron-core doesn't step "
            f"in buckets: {off}"
        )
    dtypes = {bucket.params[0].dtype for bucket in hybrid._buckets}
    if not dtypes <= {torch.bfloat16, torch.float32}:
        raise RuntimeError(f"optimizer.optimizer_split_masters=true with weights in {dtypes}: BF16 is needed; {off}")
    base: type = type(hybrid)
    hybrid.__class__ = _splitting(base)
    hybrid.transit = Transit(pinned=hybrid.pin_cpu_params)
    hybrid._init_sub_optimizers()


@functools.cache
def _splitting(base: type) -> type:
    return type(f"Split{base.__name__}", (SplitStep, base), {})
