# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A bucketed step in which the device steps on some of the offloaded buckets: their state is streamed through it.

The host stores these buckets' masters and moments as it does all others', so checkpoints, loads, the sync and its guard
see no difference. But the kernel is the one that steps without offload, and so are the bits.
"""

import functools
from typing import Any

import torch

from megatron.bridge.offload_engine.adam import FlatAdam
from megatron.bridge.offload_engine.bucket import Bucket, gradients_of
from megatron.bridge.offload_engine.step import BucketedStep
from megatron.bridge.offload_engine.streamed_state import Pipeline
from megatron.bridge.utils import device


class StreamedAdam(FlatAdam):
    """Overrides of torch's `Adam` and `AdamW`: its state is on the host, and its step on the device."""

    _pipeline: Pipeline

    @torch.no_grad()
    def _queue_steps(self, closure: Any = None) -> None:
        """The step of each bucket. Returns at once (see `Pipeline.step`)."""
        for group in self.param_groups:
            self._queue_step(group)

    step: Any = torch.optim.Optimizer.profile_hook_step(_queue_steps)  # hooks of a step are run

    def _queue_step(self, group: dict[str, Any]) -> None:
        bucket, start = self._starts[group["params"][0]]
        with device.bypass_simulation():
            gradients = gradients_of(bucket.params)
        have_gradient = [gradient is not None for gradient in gradients]
        states = [state or bucket.initial_state(at) for at, state in enumerate(self._states(bucket, start))]
        if group.get("amsgrad") or not bucket.place(states):
            raise RuntimeError(
                "optimizer.optimizer_streamed_fraction: Adam's state is not two moments and a step counter for each "
                "parameter; set optimizer.optimizer_streamed_fraction=0"
            )
        for master, state, has_gradient in zip(bucket.masters, states, have_gradient, strict=True):
            if has_gradient:
                self.state[master] = state
        options = {name: option for name, option in group.items() if name != "params"}
        self._pipeline.step(bucket, options, gradients, bucket.counters.tolist())
        bucket.counters.add_(torch.tensor(have_gradient, dtype=torch.float32, device="cpu"))


class StreamedStep(BucketedStep):
    """Overrides that let the device step on the first of the offloaded buckets; made by `stream_buckets`."""

    streamed_fraction = 0.0
    """The part of the offloaded elements, in whole buckets, that the device steps on."""

    pipeline: Pipeline | None = None

    @property
    def streamed_buckets(self) -> list[Bucket]:
        """Those that the device steps on."""
        return self._buckets[: self._num_streamed]

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple:
        groups = super()._get_sub_optimizer_param_groups(offload_fraction)
        known = vars(self).get("_streamed", ())
        self._num_streamed = _count_first(self._buckets, self.streamed_fraction)
        self._streamed = tuple(self.streamed_buckets)
        for bucket in self._streamed:
            bucket.pin_moments = self.pin_cpu_params
        if self._streamed != known:
            self.pipeline = Pipeline(self._streamed, self.gpu_optimizer_cls) if self._streamed else None
        return groups

    def _register_param_copy_back_gpu_hook(self) -> None:
        self._num_streaming_optimizers = self._num_streamed
        if not self.overlap_cpu_optimizer_d2h_h2d:  # one optimizer for all buckets
            parts = self.cpu_param_groups[: self._num_streamed], self.cpu_param_groups[self._num_streamed :]
            self.cpu_optimizers = [self.cpu_optimizer_cls(part) for part in parts if part]
            self._num_streaming_optimizers = bool(parts[0])
        super()._register_param_copy_back_gpu_hook()

    def _take_over(self, optimizer: torch.optim.Optimizer, buckets: list[Bucket]) -> None:
        if buckets[0] in self._streamed and self.pipeline is not None:
            StreamedAdam.take_over(optimizer, buckets)
            vars(optimizer)["_pipeline"] = self.pipeline
        else:
            super()._take_over(optimizer, buckets)

    @property
    def _stepped_on_the_host(self) -> list[Any]:
        return self.cpu_optimizers[self._num_streaming_optimizers :]

    def _sync_sub_optimizers_state_to_hdo(self) -> None:
        # A step ends with this. From here on the host may read the state, and write it.
        if self.pipeline is not None:
            self.pipeline.wait()
        super()._sync_sub_optimizers_state_to_hdo()


def stream_buckets(hybrid: Any, fraction: float) -> None:
    """Let the device step on a part of what a hybrid optimizer offloads. Call before anything is loaded or stepped on.

    Args:
        hybrid: Built by Core, with the repairs.
        fraction: The part, 0 to 1, of the offloaded elements; rounded up to whole buckets.

    Raises:
        ValueError: The hybrid doesn't step in buckets.
    """
    if not isinstance(hybrid, BucketedStep):
        raise ValueError(
            f"optimizer.optimizer_streamed_fraction={fraction} with {type(hybrid).__name__}, whose step isn't ours: "
            "only Adam's offloaded step streams; set optimizer.optimizer_streamed_fraction=0"
        )
    streaming: Any = hybrid
    base: type = type(hybrid)
    streaming.__class__ = _streamed(base)
    streaming.streamed_fraction = fraction
    streaming._init_sub_optimizers()


@functools.cache
def _streamed(base: type) -> type:
    return type(f"Streamed{base.__name__}", (StreamedStep, base), {})


def _count_first(buckets: list[Bucket], fraction: float) -> int:
    """How many buckets, from the first, have at least that part of all elements."""
    sizes = [sum(param.numel() for param in bucket.params) for bucket in buckets]
    count = 0
    while count < len(sizes) and sum(sizes[:count]) < fraction * sum(sizes):
        count += 1
    return count
