# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`HybridDeviceOptimizer`'s step that returns once it is queued.

    current   ... backward | norm, clip | device Adam | forward of layer 1 | of layer 2 | ...
    d2h                                 gradients of bucket 1 | of bucket 2 | ...
    worker                                  waits, Adam on bucket 1 | waits, Adam on bucket 2 | ...
    h2d                                                  masters of bucket 1 | of bucket 2 | ...

Gradients that crossed as they were reduced (`early_gradients.py`) are on their way before it. The buckets come in the
order in which the next forward pass needs their weights. The waits:

* d2h waits for the current stream before it reads gradients, and the current stream for d2h before what comes after
  the step may overwrite them or reuse their memory;
* the worker waits for a bucket's event on d2h before it steps, and with that for the bucket's masters of the step
  before: they were on the device before that step's weights were read;
* h2d waits for the current stream as it is when the step begins: gradients that crossed early say nothing about what
  still reads the weights then;
* whoever reads a bucket's weights waits for the worker, and lets its stream wait for the bucket's event on h2d.
"""

from typing import Any

import torch

from megatron.bridge.offload_engine.adam import FlatAdam
from megatron.bridge.offload_engine.late_reads import ReadsLate
from megatron.bridge.offload_engine.overlap.worker import HostWorker, Task
from megatron.bridge.offload_engine.step import BucketedStep
from megatron.bridge.utils import device


class Crossing:
    """The step of one optimizer on the host, from its gradients' arrival there to its weights' on the device."""

    def __init__(self, optimizer: FlatAdam, gradients_are_there: Any) -> None:
        self.params = [param for bucket in optimizer.buckets for param in bucket.params]
        for bucket in optimizer.buckets:
            bucket.rounds_on_the_host = True  # torch would round into pageable memory first, and wait for its copy
        self._optimizer, self._gradients_are_there = optimizer, gradients_are_there
        self._weights_are_there: Any = None
        self._task: Task | None = None

    def start(self, worker: HostWorker, back: Any) -> None:
        """Hand the step to the worker.

        Args:
            worker: Takes the step.
            back: The stream on which the weights return.
        """
        self._task = worker.submit(lambda: self._step(back))

    @torch.no_grad()
    def _step(self, back: Any) -> None:
        self._gradients_are_there.synchronize()
        self._optimizer.step()
        with device.on_stream(back):
            for bucket in self._optimizer.buckets:
                bucket.copy_weights_to_device()
        self._weights_are_there = back.record_event()

    def arrive(self) -> None:
        """Wait until the host has stepped, and let the current stream wait for the weights.

        Raises:
            Exception: What the step on the host raised.
        """
        assert self._task is not None, "not started"
        self._task.result()
        device.wait_for_event(self._weights_are_there)


class OverlappedStep(ReadsLate, BucketedStep):
    """Overrides that let `step` return early; an instance of `BucketedStep` changes its class to it."""

    worker: HostWorker
    crossings: tuple[Crossing, ...] = ()
    """Of the last step, in order; empty once all have arrived."""

    early: Any = None
    """The `EarlyGradients`, if any gradients cross before the step."""

    place_in_forward: dict[torch.Tensor, int] = {}
    """By parameter of this optimizer, when the forward pass needs it."""

    @torch.no_grad()
    def _queue_step(self, closure: Any = None) -> None:
        """Queue the step, and return. `crossings` says what of it is on its way.

        Raises:
            ValueError: A closure is given.
        """
        if closure is not None:
            raise ValueError("an overlapped step takes no closure: take the loss before it")
        self.finish()
        self._sync_hdo_param_groups_to_sub_optimizers()
        self._set_sub_optimizer_grads()
        device.start_after_current(self._h2d_stream)
        if self.gpu_optimizer is not None:
            self.gpu_optimizer.step()
        crossings = tuple(
            Crossing(optimizer, self._cpu_optimizer_map_data_event.pop(optimizer)) for optimizer in self._in_order()
        )
        for crossing in crossings:
            crossing.start(self.worker, self._h2d_stream)
        self.crossings = crossings
        device.wait_for_stream(self._d2h_stream)

    step: Any = torch.optim.Optimizer.profile_hook_step(_queue_step)  # hooks of a step are run
    step.hooked = True  # torch wraps a class's step when it builds the first instance, and not twice

    @property
    def num_rounded_bytes(self) -> int:
        """Host memory in which masters are rounded before they cross, from the first step on."""
        buckets = (bucket for optimizer in self.cpu_optimizers for bucket in optimizer.buckets)
        params = (param for bucket in buckets if bucket.split_masters is None for param in bucket.params)
        return sum(param.numel() * param.element_size() for param in params if param.dtype != torch.float32)

    def prepare_read(self) -> None:
        """Wait for the step on the host, which changes what is read."""
        self.finish()
        super().prepare_read()

    def _in_order(self) -> list[FlatAdam]:
        """The optimizers on the host, by the first of their parameters that the forward pass needs."""
        place = self.place_in_forward

        def first_use(optimizer: FlatAdam) -> int:
            return min(place.get(param, 0) for bucket in optimizer.buckets for param in bucket.params)

        return sorted(self.cpu_optimizers, key=first_use)

    def _send_gradients(self) -> None:
        device.start_after_current(self._d2h_stream)
        with device.on_stream(self._d2h_stream):
            for optimizer in self._in_order():
                event = None if self.early is None else self.early.take(optimizer)
                if event is None:
                    for bucket in optimizer.buckets:
                        bucket.copy_gradients_to_host()
                    event = self._d2h_stream.record_event()
                self._cpu_optimizer_map_data_event[optimizer] = event

    def _send_weights(self, optimizer: FlatAdam) -> None:
        """Do nothing: the crossing sends them."""

    def finish(self) -> None:
        """Wait for the step on the host, and let the current stream wait for its weights.

        Raises:
            Exception: What the step on the host raised, each time until the run ends.
        """
        if self.crossings:
            for crossing in self.crossings:
                crossing.arrive()
            self.crossings = ()
            self._sync_sub_optimizers_state_to_hdo()
