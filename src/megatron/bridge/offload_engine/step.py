# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The host's part in buckets: exact host memory, and a step without a loop over parameters.

Core makes each offloaded parameter a pinned tensor of its own, which torch rounds up to a power of two, and, with
overlap, an optimizer of its own; gradients and weights are copied, and Adam is called, tensor by tensor. And what a
step leaves in dicts of parameters is put together anew each time. Here a bucket's masters, gradients and moments are
runs of memory (`adam.py`); what checkpoints, loads and repairs see of them are the same tensors and dicts.
"""

from collections.abc import Iterator
from itertools import islice
from operator import is_
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.offload_engine.adam import Bucket, FlatAdam, states_hold
from megatron.bridge.utils import device

BUCKET_ELEMENTS = 1 << 23
"""32 MB of FP32: a copy of some milliseconds, which overlaps with the step of the bucket before."""


class BucketedStep(HybridDeviceOptimizer):
    """Overrides that put an offloaded step into buckets; mixed into Core's class or a subclass of it."""

    def _init_sub_optimizers(self) -> None:
        super()._init_sub_optimizers()
        buckets = iter(self._buckets)
        for optimizer in self.cpu_optimizers:
            FlatAdam.take_over(optimizer, list(islice(buckets, len(optimizer.param_groups))))
        group_of = {param: at for at, group in enumerate(self.param_groups) for param in group["params"]}
        self._groups_of_parts = [
            [group_of[self.inner_param_to_orig_param[group["params"][0]]] for group in part.param_groups]
            for part in self.sub_optimizers
        ]
        self._synced: list[dict] = []

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple:
        known = {frozenset(map(id, bucket.params)): bucket for bucket in vars(self).get("_buckets", ())}
        host_groups, device_groups = [], []
        copies: dict[torch.Tensor, torch.Tensor] = {}
        fp32_copies: dict[torch.Tensor, torch.Tensor] = {}
        self._buckets = []
        for group, offloaded, staying in _split(self.param_groups, offload_fraction):
            for params in split_into_buckets(offloaded):
                bucket = known.get(frozenset(map(id, params))) or Bucket(
                    params, pin_masters=self.pin_cpu_params, pin_gradients=self.pin_cpu_grads
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
        """Start from the weights, as Core does, but for masters that are the state's: a load brought those."""
        bucket.forget_gradients()
        for param, master in zip(bucket.params, bucket.masters, strict=True):
            if self.state.get(param, {}).get("master_param") is not master:
                master.copy_(param)

    @staticmethod
    def build_cpu_optimizer_list(cpu_optimizer_cls: type, cpu_param_groups: list[dict]) -> list:
        return [cpu_optimizer_cls([group]) for group in cpu_param_groups]

    def _register_param_copy_back_gpu_hook(self) -> None:
        def copy_weights_to_device(optimizer: FlatAdam, *_: Any) -> None:
            with device.queued_on(self._h2d_stream):
                for bucket in optimizer.buckets:
                    bucket.copy_weights_to_device()

        @torch.no_grad()
        def round_weights(*_: Any) -> None:
            for param, master in self._copies_on_device:
                param.data.copy_(master)

        for optimizer in self.cpu_optimizers:
            optimizer.register_step_post_hook(copy_weights_to_device)
        if self.gpu_optimizer is not None:
            self.gpu_optimizer.register_step_post_hook(round_weights)

    def _set_sub_optimizer_grads(self) -> None:
        for param, master in self._copies_on_device:
            grad = getattr(param, "decoupled_grad", param.grad)
            master.requires_grad = grad is not None
            if grad is not None:
                master.grad = grad.to(master.dtype)
        for optimizer in self.cpu_optimizers:
            for bucket in optimizer.buckets:
                bucket.copy_gradients_to_host()
            self._cpu_optimizer_map_data_event[optimizer] = self._d2h_stream.record_event()

    def _sync_hdo_param_groups_to_sub_optimizers(self) -> None:
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        for part, groups in zip(self.sub_optimizers, self._groups_of_parts, strict=True):
            part.param_groups = [{**group, **options[at]} for group, at in zip(part.param_groups, groups, strict=True)]

    def _sync_sub_optimizers_state_to_hdo(self) -> None:
        if not self._is_synced():
            super()._sync_sub_optimizers_state_to_hdo()
            self._synced = [self.state, *(part.state for part in self.sub_optimizers)]

    def _is_synced(self) -> bool:
        """Whether the hybrid's state still is that of its parts, whose own dicts it holds."""
        states = [part.state for part in self.sub_optimizers]
        return (
            len(self._synced) == len(states) + 1
            and all(map(is_, self._synced, [self.state, *states]))
            and len(self.state) == sum(map(len, states))
            and all(states_hold(state.values(), "master_param", state) for state in states)
        )

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        # Into its place at once: after Core has moved it to the host it would be there twice.
        for bucket in self._buckets:
            bucket.place([self.state[param] for param in bucket.params])
        super()._sync_hdo_state_to_sub_optimizers()


def _split(groups: list[dict], fraction: float) -> Iterator[tuple[dict, list[torch.Tensor], list[torch.Tensor]]]:
    """Each group's options, what of it is offloaded and what stays: the first parameters go, as Core has it."""
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
    """Neighbours of one dtype, as many as a bucket takes, at least one."""
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
