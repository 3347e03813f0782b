# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Attributes of a hybrid optimizer through which its state can be seen: reading one first makes the state readable."""

from typing import Any


class LateRead:
    """An attribute whose optimizer is asked to `prepare_read` before it is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, hybrid: Any, owner: type | None = None) -> Any:
        if hybrid is None:
            return self
        hybrid.prepare_read()
        try:
            return vars(hybrid)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None  # Core's lazy constructor makes it

    def __set__(self, hybrid: Any, value: Any) -> None:
        vars(hybrid)[self._name] = value


class ReadsLate:
    """The attributes by which Core, loads, saves, the sync and its guard reach state; mixed into `BucketedStep`."""

    state = LateRead()
    cpu_optimizers = LateRead()
    gpu_params_map_cpu_copy = LateRead()
    cpu_copys_map_gpu_param = LateRead()
    param_to_fp32_param = LateRead()
    param_to_inner_param = LateRead()
    inner_param_to_orig_param = LateRead()

    def prepare_read(self) -> None:
        """Do what must come before state is read. A class that puts something off overrides it, and calls this."""
