# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Torch's Adam on the host, over buckets of parameters instead of single tensors: one kernel call for each run.

The result is bit-exact with stepping on each tensor alone. Adam's kernel is element-wise, but it processes most
elements with vector instructions and the last few of a tensor with scalar ones, and the two round differently. Joining
two tensors would move the tail of the first one into the vector part. So only tensors without a tail, whose size is a
multiple of `ALIGNMENT`, join a run (`bucket.py`). All others stay separate entries in the kernel's list of tensors.
"""

import functools
from collections.abc import Sequence
from itertools import islice
from operator import is_
from typing import Any

import torch

from megatron.bridge.offload_engine.bucket import MOMENTS, Bucket, State
from megatron.bridge.offload_engine.piecewise_adam import step_in_pieces


class FlatAdam(torch.optim.Optimizer):
    """Overrides of torch's `Adam` and `AdamW` for an optimizer with one `Bucket` for each of its param groups."""

    _starts: dict[torch.Tensor, tuple[Bucket, int]]
    """By a group's first master: its bucket, and the number of masters in the groups before it."""

    @classmethod
    def take_over(cls, optimizer: torch.optim.Optimizer, buckets: Sequence[Bucket]) -> None:
        """Change an optimizer's class to this one.

        Args:
            optimizer: Torch's Adam or AdamW, with one param group for each bucket, over its masters.
            buckets: In the order of the param groups.
        """
        taken: Any = optimizer
        overrides: type = cls
        taken.__class__ = _flat(overrides, taken.__class__)
        taken._starts, start = {}, 0
        for bucket in buckets:
            taken._starts[bucket.masters[0]] = bucket, start
            start += len(bucket.masters)

    @property
    def buckets(self) -> list[Bucket]:
        """One for each param group."""
        return [bucket for bucket, _ in self._starts.values()]

    def allocate_state(self) -> None:
        """Give every master the state of step 0. State that exists is kept."""
        for bucket, start in self._starts.values():
            for at, state in enumerate(self._states(bucket, start)):
                if not state:
                    self.state[bucket.masters[at]] = bucket.initial_state(at)

    def _states(self, bucket: Bucket, start: int) -> list[State | None]:
        """The state of each master of a bucket, None where there is none.

        `self.state` usually has the order of the masters. Then its values are sliced instead of looked up one by one.
        """
        stop = start + len(bucket.masters)
        if len(self.state) >= stop and all(map(is_, islice(self.state, start, stop), bucket.masters)):
            return list(islice(self.state.values(), start, stop))
        return [self.state.get(master) for master in bucket.masters]

    def _init_group(self, group: dict[str, Any], *arguments: Any) -> bool:
        """Fill the lists that torch's `adam` takes: parameters, gradients, moments, largest moments, counters."""
        if self._starts[group["params"][0]][0].takes_pieces:
            self._step_in_pieces(group)
            return False  # nothing is left for torch's `adam` to step on
        bucket, unfinished = self._bucket_to_step_on(group), self._starts[group["params"][0]][0].unfinished
        if bucket is None:
            self._starts[group["params"][0]][0].finish_gradients()
            adam: Any = super()
            return adam._init_group(group, *arguments)
        if unfinished is not None and not unfinished.are_finished:
            step_in_pieces(bucket.step_lists(), group, unfinished.finish)
            return False
        of_kind = bucket.step_lists()
        lists = [argument for argument in arguments if isinstance(argument, list)]  # torch 2.6 adds amsgrad, a bool
        for listed, kind in zip(lists, ("master", "gradient", *MOMENTS, "largest", "step"), strict=True):
            listed += of_kind.get(kind, [])
        return False

    def _step_in_pieces(self, group: dict[str, Any]) -> None:
        """Step on a bucket whose state isn't FP32. It has only this way, whatever it lacks."""
        bucket, start = self._starts[group["params"][0]]
        if group["amsgrad"]:
            raise RuntimeError(
                f"amsgrad with {str(bucket.formats) or 'split masters'} on the host isn't built: use FP32"
            )
        found = self._states(bucket, start)
        for at, (master, state) in enumerate(zip(bucket.masters, found, strict=True)):
            if not state and bucket.has_gradient(at):
                self.state[master] = found[at] = bucket.initial_state(at)
        if not bucket.place([state or bucket.initial_state(at) for at, state in enumerate(found)]):
            raise RuntimeError(f"an optimizer with {bucket.formats} on the host lacks a moment or a step counter")
        together = bucket.has_all_gradients and bucket.counters_agree()
        lists = bucket.step_lists() if together else bucket.separate_lists()
        finish = None if bucket.unfinished is None else bucket.unfinished.finish
        if bucket.split_masters is None:
            step_in_pieces(lists, group, finish)
        else:
            bucket.split_masters.step(lists, group, finish, whole=together)

    def _bucket_to_step_on(self, group: dict[str, Any]) -> Bucket | None:
        """A group's bucket with all its state in the slabs; None if its masters must be stepped on one by one.

        That is so for another kernel than the fused one, for amsgrad, for a bucket in which a parameter has had no
        gradient yet, and where loaded state has different steps.
        """
        bucket, start = self._starts[group["params"][0]]
        if not group["fused"] or group["amsgrad"] or not bucket.has_all_gradients:
            return None
        found = self._states(bucket, start)
        states = [state for state in found if state]
        if not states:
            states = [bucket.initial_state(at) for at in range(len(found))]
            self.state.update(zip(bucket.masters, states, strict=True))
        can_be_one = len(states) == len(found) and bucket.place(states) and bucket.counters_agree()
        return bucket if can_be_one else None


@functools.cache
def _flat(flat: type, base: type) -> type:
    return type(f"{flat.__name__.removesuffix('Adam')}{base.__name__}", (flat, base), {})
