# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`HybridDeviceOptimizer`'s step in buckets: exact host memory, and no loop over parameters.

Core keeps a pinned tensor for each offloaded parameter, which torch rounds up to a power of two, and with overlap an
optimizer for each. It copies gradients and weights and calls Adam tensor by tensor, and it rebuilds its dicts of state
after every step. Here the masters, gradients and moments of a bucket are contiguous memory (`bucket.py`). Checkpoints,
loads and repairs still see the tensors and dicts that they know from Core.

The streams of one step, with `overlap_cpu_optimizer_d2h_h2d` (without it all three are the current stream):

    current     backward, reduce-scatter | device Adam ................... | all-gather, next forward
    d2h         gradients of bucket 1 | of bucket 2 | ...    each ends with an event
    host        waits for event 1, Adam on bucket 1 | event 2, Adam on bucket 2 | ...
    h2d                                 masters of bucket 1 | of bucket 2 | ...

Core orders the first three: d2h waits for the current stream before it reads gradients, and the host waits for each
bucket's event before it steps. The hooks below order the last one: h2d waits for the current stream before it writes
weights, and the current stream waits for h2d before anything reads them.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice
from operator import is_
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.offload_engine.adam import FlatAdam
from megatron.bridge.offload_engine.bucket import Bucket, states_hold
from megatron.bridge.offload_engine.state_formats import formats_of, kept_by_loads
from megatron.bridge.utils import device

BUCKET_ELEMENTS = 1 << 23
"""32 MB of FP32. The copy of a bucket takes some milliseconds and overlaps with the step of the one before."""


class BucketedStep(HybridDeviceOptimizer):
    """Overrides that make an offloaded step run bucket by bucket; mixed into Core's class or a subclass of it."""

    timers: Any = None
    """Core's timers, while the step is timed."""

    def _init_sub_optimizers(self) -> None:
        super()._init_sub_optimizers()
        buckets = iter(self._buckets)
        for optimizer in self.cpu_optimizers:
            self._take_over(optimizer, list(islice(buckets, len(optimizer.param_groups))))
        group_of = {param: at for at, group in enumerate(self.param_groups) for param in group["params"]}
        self._groups_of_parts = [
            [group_of[self.inner_param_to_orig_param[group["params"][0]]] for group in part.param_groups]
            for part in self.sub_optimizers
        ]
        self._synced: list[dict] = []

    def _take_over(self, optimizer: torch.optim.Optimizer, buckets: list[Bucket]) -> None:
        FlatAdam.take_over(optimizer, buckets)

    @property
    def _stepped_on_the_host(self) -> list[Any]:
        """The sub-optimizers to which gradients are copied, and from which weights come back."""
        return self.cpu_optimizers

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple:
        # A load makes Core build its sub-optimizers again. The buckets of the same parameters are kept: their memory
        # may hold masters and moments that were just loaded.
        known = {frozenset(map(id, bucket.params)): bucket for bucket in vars(self).get("_buckets", ())}
        host_groups, device_groups = [], []
        copies: dict[torch.Tensor, torch.Tensor] = {}
        fp32_copies: dict[torch.Tensor, torch.Tensor] = {}
        self._buckets = []
        for group, offloaded, staying in _split(self.param_groups, offload_fraction):
            for params in split_into_buckets(offloaded):
                bucket = known.get(frozenset(map(id, params))) or Bucket(
                    params,
                    pin_masters=self.pin_cpu_params,
                    pin_gradients=self.pin_cpu_grads,
                    formats=formats_of(self),
                )
                self._buckets.append(bucket)
                self._fill(bucket)
                host_groups.append({**group, "params": bucket.masters})
                copies.update(zip(bucket.params, bucket.masters, strict=True))
            fp32_copies.update((param, copies[param]) for param in offloaded if param.dtype != torch.float32)
            fp32_copies.update(
                (param, param.detach().clone().float()) for param in staying if param.dtype != torch.float32
            )
            if staying:
                device_groups.append({**group, "params": [fp32_copies.get(param, param) for param in staying]})
        self._copies_on_device = [pair for pair in fp32_copies.items() if pair[0] not in copies]
        originals = {copy: param for param, copy in copies.items()}
        return host_groups, device_groups, copies, originals, fp32_copies

    @torch.no_grad()
    def _fill(self, bucket: Bucket) -> None:
        """Set the masters to the weights, as Core does, except masters that a load has just restored into the state."""
        bucket.forget_gradients()
        for param, master in zip(bucket.params, bucket.masters, strict=True):
            if self.state.get(param, {}).get("master_param") is not master:
                master.copy_(param)

    @staticmethod
    def build_cpu_optimizer_list(cpu_optimizer_cls: type, cpu_param_groups: list[dict]) -> list:
        return [cpu_optimizer_cls([group]) for group in cpu_param_groups]

    def _register_param_copy_back_gpu_hook(self) -> None:
        def copy_weights_to_device(optimizer: FlatAdam, *_: Any) -> None:
            self._send_weights(optimizer)

        @torch.no_grad()
        def round_weights(*_: Any) -> None:
            for param, master in self._copies_on_device:
                param.data.copy_(master)

        for optimizer in self._stepped_on_the_host:
            optimizer.register_step_post_hook(copy_weights_to_device)
        if self.gpu_optimizer is not None:
            self.gpu_optimizer.register_step_post_hook(round_weights)

    def _send_weights(self, optimizer: FlatAdam) -> None:
        with self._timed("offload-weights-to-device"), device.queued_on(self._h2d_stream):
            for bucket in optimizer.buckets:
                bucket.copy_weights_to_device()

    def _set_sub_optimizer_grads(self) -> None:
        for param, master in self._copies_on_device:
            grad = getattr(param, "decoupled_grad", param.grad)
            master.requires_grad = grad is not None
            if grad is not None:
                master.grad = grad.to(master.dtype)
        self._send_gradients()

    def _send_gradients(self) -> None:
        with self._timed("offload-gradients-to-host"):
            for optimizer in self._stepped_on_the_host:
                for bucket in optimizer.buckets:
                    bucket.copy_gradients_to_host()
                self._cpu_optimizer_map_data_event[optimizer] = self._d2h_stream.record_event()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Time the copies of the context, as phases of level 2: to measure them, the timer waits for them."""
        timer = None if self.timers is None else self.timers(phase, log_level=2)
        if timer is not None:
            timer.start()
        yield
        if timer is not None:
            timer.stop()

    def _sync_hdo_param_groups_to_sub_optimizers(self) -> None:
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        for part, groups in zip(self.sub_optimizers, self._groups_of_parts, strict=True):
            part.param_groups = [{**group, **options[at]} for group, at in zip(part.param_groups, groups, strict=True)]

    def _sync_sub_optimizers_state_to_hdo(self) -> None:
        if not self._is_synced():
            super()._sync_sub_optimizers_state_to_hdo()
            self._synced = [self.state, *(part.state for part in self.sub_optimizers)]

    def _is_synced(self) -> bool:
        """Whether `self.state` still holds the sub-optimizers' own dicts, so that there is nothing to copy.

        Core copies every entry after every step. Dicts are shared here, and only a load replaces them.
        """
        states = [part.state for part in self.sub_optimizers]
        return (
            len(self._synced) == len(states) + 1
            and all(map(is_, self._synced, [self.state, *states]))
            and len(self.state) == sum(map(len, states))
            and all(states_hold(state.values(), "master_param", state) for state in states)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with kept_by_loads(self):
            super().load_state_dict(state_dict)

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        # Core would first move loaded state to the host, and `place` copy it again: twice the memory for a moment.
        for bucket in self._buckets:
            bucket.place([self.state[param] for param in bucket.params])
        super()._sync_hdo_state_to_sub_optimizers()


def _split(groups: list[dict], fraction: float) -> Iterator[tuple[dict, list[torch.Tensor], list[torch.Tensor]]]:
    """Split each param group into (options, offloaded parameters, parameters that stay on the device).

    As in Core, the first parameters are offloaded until the fraction of all elements is reached.
    """
    sizes = [param.numel() for group in groups for param in group["params"]]
    most, offloaded_elements = fraction * sum(sizes), 0
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        offloaded, staying = [], []
        for param in group["params"]:
            if offloaded_elements < most:
                offloaded.append(param)
                offloaded_elements += param.numel()
            else:
                staying.append(param)
        yield options, offloaded, staying


def split_into_buckets(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Split parameters, in order, into buckets of one dtype and at most `BUCKET_ELEMENTS`, or of one parameter."""
    bucket: list[torch.Tensor] = []
    elements = 0
    for param in params:
        if bucket and (elements + param.numel() > BUCKET_ELEMENTS or param.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(param)
        elements += param.numel()
    if bucket:
        yield bucket
