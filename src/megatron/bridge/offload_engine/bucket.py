# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A bucket: parameters that are stepped on together, and their masters, gradients and moments in host memory.

The masters that lie side by side form one *run* of memory. A run takes one kernel call (`adam.py`), one copy of its
gradients to the host and one copy of its masters back.
"""

import functools
from collections.abc import Iterable, Sequence
from itertools import pairwise, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

import torch

from megatron.bridge.offload_engine.host_memory import ALIGNMENT, Slab
from megatron.bridge.offload_engine.neighbours import breaks, is_in_one_storage
from megatron.bridge.offload_engine.split_masters import SplitMasters
from megatron.bridge.offload_engine.state_formats import FP32_STATE, StateFormats
from megatron.bridge.offload_engine.unfinished_gradients import UnfinishedGradients
from megatron.bridge.offload_engine.weight_transit import Transit
from megatron.bridge.utils import device

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_aligned(param: torch.Tensor) -> bool:
    """Whether a tensor has no scalar tail in Adam's kernel, and so can join a run (see `adam.py`)."""
    return param.numel() % ALIGNMENT == 0


def states_hold(states: Iterable[State], name: str, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether each state dict holds the very tensor at its index in `tensors` under `name`."""
    try:
        return all(map(is_, map(itemgetter(name), states), tensors))
    except KeyError:
        return False


class Bucket:
    """Parameters with the same options, and their masters, gradients and moments on the host, each kind in a `Slab`.

    Aligned parameters come first, so that they form the run; the others follow.
    """

    pin_moments = False
    """Pin the moments' memory; set it before they are first needed."""

    rounds_on_the_host = False
    """Round the masters of 16-bit parameters into host memory of their own before they cross: half as many bytes."""

    split_masters: SplitMasters | None = None
    """Stores the masters between steps as what weights lack, and sends the weights to the device."""

    unfinished: UnfinishedGradients | None = None
    """Where the next step's gradients crossed as they were reduced: those, with what is left to do."""

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        *,
        pin_masters: bool,
        pin_gradients: bool,
        formats: StateFormats = FP32_STATE,
    ) -> None:
        """Allocate the masters. Gradients and moments are allocated when they are first needed.

        Args:
            params: This rank's shards of the parameters, on the device.
            pin_masters: Pin the masters' memory; they are copied to the device after each step.
            pin_gradients: Pin the gradients' memory; they are copied from the device before each step.
            formats: Of moments and gradients.
        """
        self.formats = formats
        self.params = sorted(params, key=lambda param: not is_aligned(param))
        self._in_run = sum(map(is_aligned, params))
        self._shapes = [param.shape for param in self.params]
        self._masters, self._pin_masters = Slab(self._shapes, pinned=pin_masters), pin_masters
        self._pin_gradients = pin_gradients
        self._have_gradient: set[int] = set()
        self._known: dict[Slab, tuple[list, list[tuple[int, int]]]] = {}

    @functools.cached_property
    def _rounded(self) -> Slab:
        """The masters as they cross to the device, where they are rounded on the host."""
        return Slab(self._shapes, pinned=self._pin_masters, dtype=self.params[0].dtype)

    @functools.cached_property
    def _gradients(self) -> Slab:
        return Slab(self._shapes, pinned=self._pin_gradients, dtype=self.formats.gradient)

    @functools.cached_property
    def _reduced(self) -> dict[torch.dtype, Slab]:
        """Gradients as they were reduced, where that isn't the format of those that Adam is given; by dtype."""
        return {}

    @functools.cached_property
    def _state(self) -> dict[str, Slab]:
        """Moments, and step counters. The counters have no gaps, so that those of a run are one tensor."""
        scalars = [torch.Size()] * len(self.params)
        moments = {
            name: Slab(self._shapes, pinned=self.pin_moments, dtype=getattr(self.formats, name)) for name in MOMENTS
        }
        return {**moments, "step": Slab(scalars, alignment=1)}

    @property
    def masters(self) -> list[torch.Tensor]:
        """The masters, FP32 on the host, in the order of `params`."""
        return self._masters.tensors

    @property
    def counters(self) -> torch.Tensor:
        """The step counters in the slab, FP32 on the host, in the order of `params`."""
        return self._state["step"].run(0, len(self.params))

    def memory(self) -> dict[str, torch.Tensor]:
        """Masters and moments, by kind, each as one flat FP32 tensor in which every parameter is aligned."""
        slabs = {"master": self._masters, **{name: self._state[name] for name in MOMENTS}}
        return {name: slab.run(0, len(self.params)) for name, slab in slabs.items()}

    @property
    def entry_sizes(self) -> list[int]:
        """Elements of what a step takes one by one: the run, then each other parameter."""
        run, alone = self._masters.sizes[: self._in_run], self._masters.sizes[self._in_run :]
        return [sum(run), *alone] if run else alone

    def entries(self) -> list[torch.Tensor]:
        """The masters of each entry (see `entry_sizes`), flat, FP32."""
        alone = [tensor.view(-1) for tensor in self._masters.tensors[self._in_run :]]
        return [self._masters.run(0, self._in_run), *alone] if self._in_run else alone

    def weights_of_entries(self) -> list[list[torch.Tensor]]:
        """For each of the `entries`, flat views of the parameters on the device; neighbours are joined."""
        with device.bypass_simulation():
            flat = [param.data.view(-1) for param in self.params]
            run: list[torch.Tensor] = []
            for start, stop in self._neighbours(self._masters, self.params[: self._in_run]):
                size = sum(self._masters.sizes[start:stop])
                is_one = stop - start > 1 and is_in_one_storage(flat[start], size)
                run += [flat[start].as_strided((size,), (1,))] if is_one else flat[start:stop]
        alone = [[weight] for weight in flat[self._in_run :]]
        return [run, *alone] if run else alone

    def split_through(self, transit: Transit) -> None:
        """From now on store masters as what weights lack; needs BF16 parameters. Weights cross through `transit`."""
        self._masters.unpin()  # it is given back to the system
        self.split_masters = SplitMasters(self, self._masters, transit)

    @property
    def takes_pieces(self) -> bool:
        """Whether torch can't step on it as it is stored."""
        return not self.formats.are_fp32 or self.split_masters is not None

    @property
    def has_all_gradients(self) -> bool:
        """Whether every parameter has had a gradient since the last `forget_gradients`."""
        return len(self._have_gradient) == len(self.params)

    def has_gradient(self, at: int) -> bool:
        """Whether parameter number `at` has had a gradient since the last `forget_gradients`."""
        return at in self._have_gradient

    def forget_gradients(self) -> None:
        """Drop all gradients, as if no parameter had ever had one."""
        self._have_gradient.clear()
        for master in self.masters:
            master.grad = None

    @torch.no_grad()
    def copy_gradients_to_host(self) -> None:
        """Queue copies of the existing gradients to the host, on the current stream.

        Returns at once. The caller must wait for the stream before it reads the gradients or steps.
        """
        with device.bypass_simulation():
            gradients = gradients_of(self.params)
            if all(map(is_not, gradients, repeat(None))):
                there: Sequence[int] = range(len(gradients))
                on_host, on_device = self._pairs(self._gradients, gradients)
            else:
                there = [at for at, gradient in enumerate(gradients) if gradient is not None]
                on_host, on_device = [self._gradients.tensors[at] for at in there], [gradients[at] for at in there]
            if there:
                torch._foreach_copy_(on_host, on_device, non_blocking=True)
        if not self.has_all_gradients or self.masters[0].grad is None:
            for at in there if self.formats.are_fp32 else ():  # torch takes no gradient of another format
                self.masters[at].grad = self._gradients.tensors[at]
            self._have_gradient.update(there)

    @torch.no_grad()
    def copy_reduced_to_host(self, gradients: list[torch.Tensor], *, in_fp32: bool) -> UnfinishedGradients:
        """Queue copies of all gradients to the host as they are, on the current stream. Returns at once.

        Args:
            gradients: In the order of `params`, of one dtype.
            in_fp32: See `UnfinishedGradients`.
        """
        dtype = gradients[0].dtype
        if dtype != self.formats.gradient and dtype not in self._reduced:
            self._reduced[dtype] = Slab(self._shapes, pinned=self._pin_gradients, dtype=dtype)
        slab = self._gradients if dtype == self.formats.gradient else self._reduced[dtype]
        with device.bypass_simulation():
            on_host, on_device = self._pairs(slab, gradients)
            torch._foreach_copy_(on_host, on_device, non_blocking=True)
        return UnfinishedGradients(slab, in_fp32=in_fp32, stored_as=self.formats.gradient)

    def step_on(self, unfinished: UnfinishedGradients | None) -> None:
        """Let the next step take gradients that crossed as they were reduced; None: those that `copy_...` brings."""
        self.unfinished = unfinished
        if unfinished is not None:
            self._have_gradient.update(range(len(self.params)))

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Finish unfinished gradients at once, and give each master its own."""
        unfinished, self.unfinished = self.unfinished, None
        if unfinished is not None:
            pairs = zip(unfinished.slab.tensors, self._gradients.tensors, self.masters, strict=True)
            with device.bypass_simulation():
                for reduced, place, master in pairs:
                    place.copy_(unfinished.finish(reduced, torch.empty_like(master)))
                    master.grad = place

    @torch.no_grad()
    def copy_weights_to_device(self) -> None:
        """Queue copies of the masters to the parameters on the device, on the current stream; rounds to their dtype.

        Returns at once, or once they are rounded. The masters must not change before the stream has finished.
        """
        if self.split_masters is not None:
            return  # its step has queued them
        slab = self._masters
        with device.bypass_simulation():
            if self.rounds_on_the_host and self.params[0].dtype != torch.float32:
                slab = self._rounded
                torch._foreach_copy_(slab.tensors, self.masters)
            on_host, on_device = self._pairs(slab, self.params)
            torch._foreach_copy_([tensor.data for tensor in on_device], on_host, non_blocking=True)

    def _pairs(self, slab: Slab, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Source and target tensors of a copy; tensors that are neighbours on both sides are joined into one."""
        on_host, on_device = slab.tensors[self._in_run :], tensors[self._in_run :]
        for start, stop in self._neighbours(slab, tensors[: self._in_run]):
            if stop - start > 1 and is_in_one_storage(tensors[start], sum(slab.sizes[start:stop])):
                on_host.append(slab.run(start, stop))
                on_device.append(tensors[start].as_strided(on_host[-1].shape, (1,)))
            else:
                on_host += slab.tensors[start:stop]
                on_device += tensors[start:stop]
        return on_host, on_device

    def _neighbours(self, slab: Slab, tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
        """Ranges of tensors that lie side by side in device memory, as (start, stop) pairs of indices.

        The result of the last step is reused while all addresses are the same, which is the usual case.
        """
        begins = [tensors[0].dtype, *map(torch.Tensor.data_ptr, tensors)] if tensors else []
        known, ranges = self._known.get(slab, ([], []))
        if known != begins:
            ranges = list(pairwise([0, *breaks(tensors), len(tensors)]))
            self._known[slab] = begins, ranges
        return ranges

    @torch.no_grad()
    def place(self, states: Sequence[State]) -> bool:
        """Copy state that lies elsewhere, as after a load, into the slabs, and let the dicts hold the slabs' tensors.

        Returns:
            False if a dict lacks a moment or the step counter; the bucket can't be stepped on as a run then.
        """
        for name, slab in self._state.items():
            if states_hold(states, name, slab.tensors):
                continue
            for state, place in zip(states, slab.tensors, strict=True):
                tensor = state.get(name)
                if not isinstance(tensor, torch.Tensor):
                    return False
                if tensor.data_ptr() != place.data_ptr():
                    place.copy_(tensor)
                state[name] = place
        return True

    @torch.no_grad()
    def initial_state(self, at: int) -> State:
        """The state of master number `at` at step 0: zero moments and a zero counter, in the slabs."""
        return {name: slab.tensors[at].zero_() for name, slab in self._state.items()}

    def counters_agree(self) -> bool:
        """Whether all masters of the run are at the same step. All state must be in the slabs (see `place`)."""
        counters = self._counters_of_run()
        return bool((counters == counters[:1]).all())

    @torch.no_grad()
    def step_lists(self) -> dict[str, list[torch.Tensor]]:
        """The tensor lists that torch's `adam` takes for one step, by kind. All state must be in the slabs.

        `adam` increments the counters that it is given, which is the first one of the run. The run's other counters
        are incremented here, so that each tensor's saved step stays right.
        """
        self._counters_of_run()[1:] += 1
        slabs = self._slabs_to_step_on()
        lists = {name: slab.tensors[self._in_run :] for name, slab in slabs.items()}
        if self._in_run:
            for name, slab in slabs.items():
                lists[name].insert(0, slab.tensors[0] if name == "step" else slab.run(0, self._in_run))
        return lists

    def separate_lists(self) -> dict[str, list[torch.Tensor]]:
        """The same lists with each parameter by itself, of those that have had a gradient."""
        slabs = self._slabs_to_step_on()
        there = sorted(self._have_gradient)
        return {name: [slab.tensors[at] for at in there] for name, slab in slabs.items()}

    def _slabs_to_step_on(self) -> dict[str, Slab]:
        gradients = self._gradients if self.unfinished is None else self.unfinished.slab
        return {"master": self._masters, "gradient": gradients, **self._state}

    def _counters_of_run(self) -> torch.Tensor:
        return self._state["step"].run(0, self._in_run)


def gradients_of(params: list[torch.Tensor]) -> list[Any]:
    """Each parameter's gradient, None where there is none. Core sets `decoupled_grad` in precision-aware mode."""
    try:
        return list(map(attrgetter("decoupled_grad"), params))
    except AttributeError:
        gradients = list(map(attrgetter("grad"), params))
    if all(map(is_not, gradients, repeat(None))):
        return gradients
    return [getattr(param, "decoupled_grad", param.grad) for param in params]
