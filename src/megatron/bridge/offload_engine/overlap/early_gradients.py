# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Gradients that cross to the host as soon as they are reduced, before they are scaled and clipped.

    current   ... backward of layer 2 | of layer 1 | last reductions | norm, over all gradients
    d2h              gradients of bucket 2 | of bucket 1 ...
    worker                                                            Adam on bucket 1: factors, then the step | ...

DDP reduces each of its groups of buckets once, in the backward pass of the last micro-batch or, without
`ddp.overlap_grad_reduce`, after it. A bucket of the optimizer crosses once all groups that hold its gradients are
reduced. Whatever then multiplies all gradients (tokens, loss scale, clipping) does it on the device for the norm, and
is a factor that the host repeats. What changes single gradients later (`later_changes.py`) lets their buckets cross
after it, as all do in other steps. The waits:

* d2h waits for the reduction, and for the current stream;
* the main thread waits for the host's step of the last time before a bucket's gradients are overwritten;
* the current stream waits for d2h before it scales gradients in place.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.utils import get_model_config

from megatron.bridge.offload_engine.adam import FlatAdam
from megatron.bridge.offload_engine.bucket import Bucket, gradients_of
from megatron.bridge.offload_engine.mixins import mix_in
from megatron.bridge.offload_engine.overlap.arrivals import Arrivals, ShardsArriveLater, groups_of
from megatron.bridge.offload_engine.overlap.later_changes import changed_after_reduction, reason_to_wait
from megatron.bridge.offload_engine.unfinished_gradients import UnfinishedGradients
from megatron.bridge.utils import device

logger = logging.getLogger(__name__)

NUM_CHECKED_STEPS = 2
"""Steps in which what crossed is compared with the device's gradients."""


class Planned:
    """A bucket that crosses early."""

    def __init__(self, part: ShardsArriveLater, bucket: Bucket) -> None:
        self.part, self.bucket = part, bucket
        self.weights = [part.weight_of[shard] for shard in bucket.params]
        self.gradients = [_owned_gradient(part, weight) for weight in self.weights]
        self.dtypes = {gradient.dtype for gradient in self.gradients}
        """Of the reduction; one, where the bucket can cross early."""
        self.groups: set[Any] = set()
        self.buffers = {id(part.buffers[part.model_param_gbuf_map[weight][0]]) for weight in self.weights}


class Crossed:
    """What crossed of a bucket in this step, and the factors since."""

    def __init__(self, unfinished: UnfinishedGradients, event: Any, buffers: set[int]) -> None:
        self.unfinished, self.event = unfinished, event
        self.scaled: dict[int, list[Any]] = {buffer: [] for buffer in buffers}
        self.unscaled: float | None = None
        self.is_ready = False


class EarlyGradients:
    """The gradients of all overlapped optimizers of a model that have crossed in this step."""

    def __init__(self, arrivals: Arrivals, parts: list[Any], model: list[Any]) -> None:
        """Let DDP say what is reduced and scaled.

        Args:
            arrivals: Of the model's weights.
            parts: Its overlapped optimizers.
            model: This rank's chunks, wrapped in DDP.
        """
        self._arrivals, self._parts, self._model = arrivals, parts, model
        self._plan: dict[FlatAdam, Planned] = {}
        self._planned_for: list[Any] = []
        self._reduced: set[Any] = set()
        self._crossed: dict[FlatAdam, Crossed] = {}
        self._num_checked, self._is_off = 0, False
        self.is_wanted = False
        """Whether nobody changes gradients between their reduction and the step, but in ways that are known here."""
        for chunk in model:
            for group in groups_of(chunk):
                _let_say(group, _SaysWhatIsReduced, self)
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                _let_say(buffer, _SaysWhatIsScaled, self)

    @torch.no_grad()
    def is_reduced(self, group: Any, handle: Any) -> None:
        """Let all buckets cross whose gradients are all reduced, or will be once a handle says so."""
        if self._is_off or not self.is_wanted or group in self._reduced:
            return
        self._make_plan()
        self._reduced.add(group)
        ready = {of: planned for of, planned in self._plan.items() if group in planned.groups}
        for stream in {planned.part.optimizer._d2h_stream for planned in ready.values()}:
            device.start_after_current(stream)
            if handle is not None:
                with device.on_stream(stream):
                    handle.wait()
        for optimizer, planned in ready.items():
            if planned.groups <= self._reduced:
                self._cross(optimizer, planned)

    def _cross(self, optimizer: FlatAdam, planned: Planned) -> None:
        self._arrivals.wait_for_host_of(planned.weights)
        if self._arrivals.failure is not None:
            return
        stream = planned.part.optimizer._d2h_stream
        in_fp32 = not planned.part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        with device.on_stream(stream):
            unfinished = planned.bucket.copy_reduced_to_host(planned.gradients, in_fp32=in_fp32)
        self._crossed[optimizer] = Crossed(unfinished, stream.record_event(), planned.buffers)

    def forget(self, group: Any) -> None:
        """Forget that a group was reduced, and what crossed of it: its gradients change again."""
        self._reduced.discard(group)
        for optimizer in [of for of in self._crossed if group in self._plan[of].groups]:
            del self._crossed[optimizer]

    def is_scaled(self, buffer: Any, factor: Any) -> None:
        """Note a factor by which the current stream multiplies all gradients of a buffer next."""
        found = [of for of, crossed in self._crossed.items() if id(buffer) in crossed.scaled]
        self._wait_before_changes(found)
        for optimizer in found:
            self._crossed[optimizer].scaled[id(buffer)].append(factor)

    def is_unscaled(self, part: ShardsArriveLater) -> None:
        """Note that the current stream divides an optimizer's gradients by the loss scale next."""
        found = [of for of in self._crossed if self._plan[of].part is part]
        self._wait_before_changes(found)
        for optimizer in found:
            self._crossed[optimizer].unscaled = float(part.grad_scaler.inv_scale)

    def _wait_before_changes(self, optimizers: list[FlatAdam]) -> None:
        for stream in {self._plan[of].part.optimizer._d2h_stream for of in optimizers}:
            device.wait_for_stream(stream)

    def norm_is_taken(self, norm: Any) -> None:
        """Find the factors of all that crossed, the one of clipping included, and let the device clip only the rest.

        Args:
            norm: Of all gradients, a number or a tensor of one element.
        """
        if self._crossed and self._num_checked < NUM_CHECKED_STEPS:
            self._num_checked += 1
            self._check()
        for optimizer, crossed in list(self._crossed.items()):
            planned = self._plan[optimizer]
            factors = _factors(crossed)
            if factors is None:
                del self._crossed[optimizer]
                continue
            max_norm = planned.part.config.clip_grad
            coefficient = float(max_norm / (norm + 1.0e-6)) if max_norm > 0 else 1.0  # as Core's clipping
            crossed.unfinished.factors = [*factors, coefficient] if coefficient < 1.0 else factors
            crossed.is_ready = True
            for shard in planned.bucket.params:
                if hasattr(shard, "decoupled_grad"):
                    shard.decoupled_grad = None
                shard.grad = None

    def take(self, optimizer: FlatAdam) -> Any:
        """Let a bucket be stepped on with what crossed early of it, if anything did.

        Returns:
            The event on d2h behind it; None if its gradients are still to be copied.
        """
        crossed = self._crossed.pop(optimizer, None)
        is_taken = crossed is not None and crossed.is_ready
        for bucket in optimizer.buckets:
            bucket.step_on(crossed.unfinished if is_taken and crossed is not None else None)
        return crossed.event if is_taken and crossed is not None else None

    @torch.no_grad()
    def _check(self) -> None:
        """Compare what crossed with the device's gradients; if they differ, let all cross after they are complete."""
        for optimizer, crossed in self._crossed.items():
            planned, factors = self._plan[optimizer], _factors(crossed)
            crossed.event.synchronize()
            if factors is None:
                continue
            crossed.unfinished.factors = factors
            for at, shard in enumerate(planned.bucket.params):
                (gradient,) = gradients_of([shard])
                found = crossed.unfinished.scaled(crossed.unfinished.slab.tensors[at])
                if not torch.equal(gradient.cpu(), found):
                    self._turn_off()
                    return

    def _turn_off(self) -> None:
        logger.warning(
            "gradients change between their reduction and the step, but not in Megatron-Core's finalize_model_grads: "
            "from now on they cross to the host in the step"
        )
        self._is_off = True
        self._crossed.clear()

    def planned(self) -> list[Planned]:
        """The buckets that cross early, as things are."""
        return list(plan_of(self._parts, self._model)[0].values())

    def _make_plan(self) -> None:
        """Find the buckets that can cross early, once for these optimizers; a load makes new ones."""
        function = getattr(get_model_config(self._model[0]), "finalize_model_grads_func", None)
        optimizers = [optimizer for part in self._parts for optimizer in vars(part.optimizer)["cpu_optimizers"]]
        known = [function, *optimizers]
        if len(known) == len(self._planned_for) and all(a is b for a, b in zip(known, self._planned_for, strict=True)):
            return
        self._planned_for = known
        self._crossed.clear()
        self._plan, reason = plan_of(self._parts, self._model)
        at_once = len(self._plan)
        logger.info(
            "gradients of %d of %d buckets cross to the host as they are reduced%s",
            at_once,
            len(optimizers),
            "" if at_once == len(optimizers) else f", the others in the step: {reason}",
        )


def plan_of(parts: list[Any], model: list[Any]) -> tuple[dict[FlatAdam, Planned], str]:
    """The buckets that can cross as they are reduced, and why others can't."""
    reason = next(filter(None, map(reason_to_wait, model)), None)
    config = get_model_config(model[0])
    if parts[0].config.log_num_zeros_in_grad:
        reason = "optimizer.log_num_zeros_in_grad=true"
    if reason is not None:
        return {}, reason
    later = {param for chunk in model for param in changed_after_reduction(chunk)}
    group_of = {
        param: group for chunk in model for group in groups_of(chunk) for each in group.buckets for param in each.params
    }
    plan, reason = {}, ""
    for part in parts:
        for optimizer in vars(part.optimizer)["cpu_optimizers"]:
            planned = Planned(part, *optimizer.buckets)
            if not later.isdisjoint(planned.weights):
                reason = "ranks still sum them then"
            elif any(dtype.itemsize > planned.bucket.formats.gradient.itemsize for dtype in planned.dtypes):
                reason = f"the host stores them in {planned.bucket.formats.gradient} (optimizer.main_grads_dtype)"
            elif len(planned.dtypes) > 1:
                reason = f"they are in {len(planned.dtypes)} formats"
            elif getattr(config, "calculate_per_token_loss", False) and planned.dtypes != {torch.float32}:
                reason = "they are divided in 16 bits (model.calculate_per_token_loss)"
            else:
                planned.groups = {group_of[weight] for weight in planned.weights}
                plan[optimizer] = planned
    return plan, reason


def _factors(crossed: Crossed) -> list[float] | None:
    """The factors so far; None if they aren't the same for all of a bucket, or aren't numbers."""
    scaled = list(crossed.scaled.values())
    if any(isinstance(factor, torch.Tensor) and factor.numel() != 1 for factors in scaled for factor in factors):
        return None
    numbers = [[float(factor) for factor in factors] for factors in scaled]
    if any(of_buffer != numbers[0] for of_buffer in numbers):
        return None
    is_16_bit = crossed.unfinished.slab.dtype != torch.float32
    if numbers[0] and is_16_bit:  # the device may round the factor first
        return None
    return numbers[0] + ([] if crossed.unscaled is None else [crossed.unscaled])


def _owned_gradient(part: ShardsArriveLater, weight: Any) -> torch.Tensor:
    owned = part._get_model_param_range_map(weight)["param"]
    return weight.main_grad.view(-1)[owned.start : owned.end]


def _let_say(built: Any, mixin: type, early: EarlyGradients) -> None:
    mix_in(built, mixin)
    built.early = weakref.ref(early)


class _SaysWhatIsReduced:
    """Overrides of DDP's group of buckets."""

    early: Callable[[], "EarlyGradients | None"]

    def start_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        core: Any = super()
        group: Any = self
        early = self.early()
        if early is not None and group.grad_reduce_handle is None:
            early.forget(group)
        core.start_grad_sync(*args, **kwargs)
        is_simple = not group.ddp_config.reduce_scatter_with_fp32_accumulation  # its handle can be waited for once
        if early is not None and group.grad_reduce_handle is not None and is_simple:
            early.is_reduced(group, group.grad_reduce_handle)

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        core: Any = super()
        core.finish_grad_sync(*args, **kwargs)
        early = self.early()
        if early is not None:
            early.is_reduced(self, None)

    def reset(self) -> None:
        core: Any = super()
        core.reset()
        early = self.early()
        if early is not None:
            early.forget(self)


class _SaysWhatIsScaled:
    """Override of DDP's buffer of gradients."""

    early: Callable[[], "EarlyGradients | None"]

    def scale_gradients(self, scaling_factor: Any) -> None:
        early = self.early()
        if early is not None:
            early.is_scaled(self, scaling_factor)
        core: Any = super()
        core.scale_gradients(scaling_factor)


def detach(model: list[Any]) -> None:
    """Let a model's gradients cross for no optimizer that was built before."""
    for chunk in model:
        told = (*groups_of(chunk), *chunk.buffers, *chunk.expert_parallel_buffers)
        for one in told:
            if isinstance(one, (_SaysWhatIsReduced, _SaysWhatIsScaled)):
                one.early = _nobody


def _nobody() -> None:
    """What a reference to an optimizer that is gone returns."""


class NormIsShared(ChainedOptimizer):
    """Override of Core's chain of optimizers: what is clipped on the host needs its norm, too."""

    early: EarlyGradients

    def get_grad_norm(self) -> Any:
        norm = super().get_grad_norm()
        self.early.norm_is_taken(norm)
        return norm
