# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The weights of an overlapped step on their way to the model: who needs one waits for it.

Weights pass three stations. The hybrid optimizer's copies arrive on the device (`hybrid.py`); in default mode they are
FP32 shards, which are then copied to the 16-bit weights; with data-parallel ranks these are then gathered, one of DDP's
groups of buckets after the other. Core does the last two in `step`. Here whoever needs a weight does them for it.

All ranks of a data-parallel group need weights in the same order, because they run the same modules. So their gathers
have the same order, too. That is why a step on the host that failed is remembered and not raised where a weight is
needed: the others would wait in their gather.
"""

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.offload_engine.mixins import mix_in
from megatron.bridge.offload_engine.overlap.hybrid import Crossing

logger = logging.getLogger(__name__)


class Arrivals:
    """What of a model's weights isn't there yet, over all optimizers of the model."""

    def __init__(self, model: list[Any]) -> None:
        """Let DDP's groups of buckets ask before they gather.

        Args:
            model: This rank's chunks, wrapped in DDP.
        """
        self.failure: Exception | None = None
        """What a step on the host raised."""
        self._parts: dict[Crossing, ShardsArriveLater] = {}
        self._crossing_of: dict[torch.Tensor, Crossing] = {}
        self._to_gather: dict[Any, None] = {}
        self._is_stepping = False
        self._group_of: dict[torch.Tensor, Any] = {}
        self._groups = [group for chunk in model for group in groups_of(chunk)]
        for group in self._groups:
            _let_ask(group, self)
            self._group_of.update((param, group) for bucket in group.buckets for param in bucket.params)

    @property
    def are_complete(self) -> bool:
        """Whether all weights are there."""
        return not self._parts and not self._to_gather

    def expect(self, part: "ShardsArriveLater", crossings: Iterable[Crossing]) -> None:
        """Note what is on its way.

        Args:
            part: The optimizer that has taken a step.
            crossings: Of its hybrid optimizer.
        """
        for crossing in crossings:
            self._parts[crossing] = part
            self._crossing_of.update((part.weight_of[shard], crossing) for shard in crossing.params)

    @contextlib.contextmanager
    def gathered_later(self) -> Iterator[None]:
        """Within the context, `start_param_sync` only notes what is to be gathered, and so is what Core puts off."""
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False
        self._to_gather.update((group, None) for group in self._groups if group.ddp_config.overlap_param_gather)

    def is_put_off(self, group: Any) -> bool:
        """Whether a group's gather, which Core starts now, is done when its weights are needed."""
        if not self._is_stepping or group.ddp_config.overlap_param_gather:
            return False
        if group.intra_distributed_optimizer_instance_size > 1:
            self._to_gather[group] = None
        return True

    def wait_for(self, params: Iterable[torch.Tensor]) -> None:
        """Wait for weights, and for all others that are gathered together with them."""
        if self.are_complete:
            return
        for param in params:
            group = self._group_of.get(param)
            if group is not None and group in self._to_gather:
                group.start_param_sync()
            self._arrive(self._crossing_of.get(param))

    def wait_for_group(self, group: Any) -> None:
        """Wait for what a group gathers. It is gathered next."""
        for bucket in group.buckets:
            for param in bucket.params_list:
                self._arrive(self._crossing_of.get(param))
        self._to_gather.pop(group, None)

    def wait_for_part(self, part: "ShardsArriveLater") -> None:
        """Wait for the weights of one optimizer, without gathering them.

        Raises:
            Exception: What a step on the host raised.
        """
        for crossing in [crossing for crossing, of_part in self._parts.items() if of_part is part]:
            self._arrive(crossing)
        if self.failure is not None:
            raise self.failure

    def wait_for_host(self) -> None:
        """Wait for all steps on the host, without gathering weights. What one raised is remembered, not raised."""
        for crossing in list(self._parts):
            self._arrive(crossing)

    def wait_for_host_of(self, params: Iterable[torch.Tensor]) -> None:
        """The same for the steps on the host that some weights take part in."""
        for param in params:
            self._arrive(self._crossing_of.get(param))

    def wait_for_all(self) -> None:
        """Wait for all weights, and gather those that ranks gather later. Collective, unless all are there."""
        self.wait_for_host()
        for group in self._groups:
            if group in self._to_gather or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)
        self._to_gather.clear()

    @torch.no_grad()
    def _arrive(self, crossing: Crossing | None) -> None:
        part = None if crossing is None else self._parts.get(crossing)
        if crossing is None or part is None:
            return
        try:
            crossing.arrive()
            part.copy_to_weights(crossing.params)
        except Exception as failure:
            if self.failure is None:
                logger.exception("the optimizer's step on the host failed")
                self.failure = failure
        del self._parts[crossing]


class ShardsArriveLater(DistributedOptimizer):
    """Overrides for an overlapped hybrid optimizer; a built `DistributedOptimizer` changes its class to it."""

    arrivals: Arrivals
    early: Any = None
    """The `EarlyGradients`, if any gradients cross before the step."""
    weight_of: dict[torch.Tensor, torch.Tensor]
    """The model's parameter of each shard that the hybrid optimizer was given."""

    def prepare_grads(self) -> bool:
        if self.early is not None and self.grad_scaler:
            self.early.is_unscaled(self)
        return super().prepare_grads()

    def step_with_ready_grads(self) -> bool:
        """Queue the step. The weights arrive later."""
        self.arrivals.wait_for_part(self)
        with self.arrivals.gathered_later():
            return super().step_with_ready_grads()

    def _copy_main_params_to_model_params(self) -> None:
        crossings = self.optimizer.crossings
        self.arrivals.expect(self, crossings)
        on_their_way = {shard for crossing in crossings for shard in crossing.params}
        self.copy_to_weights(shard for shard in self.weight_of if shard not in on_their_way)

    def copy_to_weights(self, shards: Iterable[torch.Tensor]) -> None:
        """Copy FP32 shards to their 16-bit weights, as Core does. Other shards are the weights."""
        if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            return
        for shard in shards:
            param = self.weight_of[shard]
            if param.dtype == shard.dtype:
                continue
            owned = self._get_model_param_range_map(param)["gbuf_world_in_bucket"]
            buffer, _, bucket = self.model_param_gbuf_map[param]
            weights = self.buffers[buffer].buckets[bucket].param_data.view(-1)
            weights[owned.start : owned.end].copy_(shard)


def gathers_late(chunk: Any) -> bool:
    """Whether data-parallel ranks gather a chunk's weights in the next forward pass (`ddp.overlap_param_gather`)."""
    return getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False)


def gather_late_weights(model: Iterable[Any]) -> None:
    """Gather what data-parallel ranks would gather in the next forward pass. Collective where there is any.

    Args:
        model: This rank's chunks, wrapped in DDP or not.
    """
    for chunk in filter(gathers_late, model):
        is_due = (not group.param_gather_dispatched or group.param_gather_handle for group in groups_of(chunk))
        if any(is_due):
            chunk.start_param_sync(force_sync=True)


def groups_of(chunk: Any) -> list[Any]:
    """DDP's groups of buckets of a chunk."""
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def weights_of_shards(optimizer: DistributedOptimizer) -> dict[torch.Tensor, torch.Tensor]:
    """The model's parameter of each shard that a distributed optimizer steps on."""
    is_precision_aware = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    shards = optimizer.shard_float16_groups if is_precision_aware else optimizer.shard_fp32_from_float16_groups
    pairs = (
        *zip(shards, optimizer.model_float16_groups, strict=True),
        *zip(optimizer.shard_fp32_groups, optimizer.model_fp32_groups, strict=True),
    )
    return {shard: param for group in pairs for shard, param in zip(*group, strict=True)}


def _let_ask(group: Any, arrivals: Arrivals) -> None:
    """Let a group of DDP's buckets wait for its weights before it gathers them."""
    mix_in(group, _GatherOnArrival)
    group.arrivals = weakref.ref(arrivals)


class _GatherOnArrival:
    """Overrides of DDP's group of buckets."""

    arrivals: "weakref.ref[Arrivals]"

    def start_param_sync(self, force_sync: bool = False) -> None:
        arrivals = self.arrivals()
        if arrivals is not None:
            if arrivals.is_put_off(self):
                return
            arrivals.wait_for_group(self)
        core: Any = super()
        core.start_param_sync(force_sync=force_sync)
