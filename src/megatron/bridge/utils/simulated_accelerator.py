# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A simulated accelerator: host memory that poses as CUDA memory, for machines without a GPU.

Megatron-Core asks its tensors `is_cuda` and hard-codes `torch.cuda` calls, and its `HybridDeviceOptimizer` splits
parameters by where they live. `install()` lets all of that run unchanged on a laptop or in CI:

* a *host* tensor is one made with `device="cpu"`, returned by `.cpu()`, or derived from one; every other tensor is a
  *device* tensor: `is_cuda` is true, `.type()` says `torch.cuda.…`, `.cpu()` makes a host copy and `.cuda()` goes back;
* streams and events order nothing (host work is already in order), pinned memory is plain memory.

Not simulated: the error for mixing host and device tensors, a separate generator for the device, device memory limits.
`tensor.device` says `cpu` on both sides, so what is made with `device=tensor.device` counts as a host tensor.
Both kinds of tensor share storage rules with stock torch, so all arithmetic is the CPU's, but for products of 16-bit
matrices where it has none for them (`matrix_products.py`).
"""

import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron.bridge.utils import matrix_products

_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]  # torch's stubs say bool; it is a descriptor

_HOST_MARK = "_simulated_host"
"""Attribute of a tensor that lies on the host."""


class _Event:
    """A CUDA event on a machine where all calls are synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time_seconds = 0.0

    def record(self, *args: Any) -> None:
        self._time_seconds = time.perf_counter()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end._time_seconds - self._time_seconds) * 1e3


class _Stream:
    """A CUDA stream on a machine with a single queue, the calling thread."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


def _named_device(value: Any) -> str | None:
    """`cuda` or `cpu` where `value` names a device, else None. A bare int is a CUDA ordinal, as in torch."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return "cuda"
    if isinstance(value, torch.device):
        return value.type if value.type in ("cuda", "cpu") else None
    if isinstance(value, str):
        kind = value.split(":", 1)[0]
        return kind if kind in ("cuda", "cpu") else None
    return None


def _is_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and getattr(value, _HOST_MARK, False)


def _mark_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        setattr(value, _HOST_MARK, True)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _mark_host(item)
    return value


def _moved(tensor: torch.Tensor, *, to_host: bool) -> torch.Tensor:
    """`tensor` itself where it is already there, else a copy on the other side. Autograd flows through the copy."""
    if _is_host(tensor) == to_host:
        return tensor
    copy = tensor.clone()
    setattr(copy, _HOST_MARK, to_host)
    return copy


def _tensor_to(tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """`Tensor.to` where a device may be named: the dtype change is torch's, the move is ours."""
    target = None
    rest, flags = [], []
    for arg in args:
        if arg is None:  # Module.to passes a dtype of None
            continue
        if isinstance(arg, bool):
            flags.append(arg)
        elif isinstance(arg, torch.Tensor):
            target = "cpu" if _is_host(arg) else "cuda"
            rest.append(arg.dtype)
        elif not isinstance(arg, torch.dtype) and _named_device(arg) is not None:
            target = _named_device(arg)
        else:
            rest.append(arg)
    if "device" in kwargs:
        target = _named_device(kwargs["device"]) or target
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    kwargs = {**kwargs, **dict(zip(("non_blocking", "copy"), flags, strict=False))}
    was_host = _is_host(tensor)
    to: Any = torch.Tensor.to
    result = to(tensor, *rest, **kwargs) if rest or kwargs else tensor
    if was_host and result is not tensor:
        _mark_host(result)
    return result if target is None else _moved(result, to_host=target == "cpu")


class _SimulatedDevice(TorchFunctionMode):
    """Answers for the device in every torch call of the thread that installed it."""

    enabled = True
    holds_data = True
    """False: tensors on both sides are meta tensors, which have a shape and no memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if not self.enabled:
            return func(*args, **kwargs)
        subject: Any = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func == _IS_CUDA:
            return not _is_host(subject)
        if func is torch.Tensor.cpu:
            return _moved(subject, to_host=True)
        if func is torch.Tensor.cuda:
            return _moved(subject, to_host=False)
        if func is torch.Tensor.pin_memory:
            return subject
        if func is torch.Tensor.to:
            return _tensor_to(subject, args[1:], kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(subject)
            name = name.replace("torch.meta.", "torch.")
            return name if _is_host(subject) else name.replace("torch.", "torch.cuda.")
        made_on_host = _is_host(subject)
        if "device" in kwargs and kwargs["device"] is not None:
            named = _named_device(kwargs["device"])
            made_on_host = named == "cpu"
            if named is not None and not self.holds_data:
                kwargs["device"] = torch.device("meta")
            elif named == "cuda":
                kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        result = func(*args, **kwargs)
        return _mark_host(result) if made_on_host else result


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """Run the autograd engine with the mode active, because Core's autograd functions create device tensors.

    A mode is inactive within a call that it handles. `Tensor.backward` and, in newer torch, `torch.autograd.backward`
    are such calls. If the mode were active twice, it would take its own tensors for host memory.
    """
    is_in_force = any(mode is _mode for mode in torch.overrides._get_current_function_mode_stack())
    mode = contextlib.nullcontext() if is_in_force or _mode is None else _mode
    with mode:
        return torch.autograd.graph._engine_run_backward(*args, **kwargs)


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) for each name of `torch.cuda` that Megatron-Core calls during training."""

    def returning(value: Any) -> Callable[..., Any]:
        # A new function for each name: dynamo indexes torch.cuda's functions by identity.
        return lambda *args, **kwargs: value

    cuda = torch.cuda
    inert_objects = {
        "current_device": returning(0),
        "device_count": returning(1),
        "is_initialized": returning(True),
        "set_device": returning(None),
        "device": returning(contextlib.nullcontext()),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "stream": returning(contextlib.nullcontext()),
        "set_stream": returning(None),
        "synchronize": returning(None),
        "is_current_stream_capturing": returning(False),
        "default_generators": (torch.default_generator,),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "_lazy_call": lambda call, **kwargs: call(),
        "empty_cache": returning(None),
        "memory_allocated": returning(0),
        "max_memory_allocated": returning(0),
        "memory_reserved": returning(0),
        "max_memory_reserved": returning(0),
        "reset_peak_memory_stats": returning(None),
        "memory_stats": returning({}),
        "get_device_capability": returning((8, 0)),
    }
    listed: list[tuple[Any, str, Any]] = [(cuda, name, stand_in) for name, stand_in in inert_objects.items()]
    listed += [(cuda.random, name, inert_objects[name]) for name in ("get_rng_state", "set_rng_state")]
    listed += [(cuda.nvtx, name, returning(None)) for name in ("range_push", "range_pop")]
    listed += [(torch.autograd, "_engine_run_backward", _run_backward)]
    # Its C function requires a real stream before a mode is called.
    listed += [(torch.Tensor, "record_stream", returning(None))]
    return listed


_mode: _SimulatedDevice | None = None
_originals: list[tuple[Any, str, Any]] = []


def is_installed() -> bool:
    """Whether this process computes on the simulated accelerator."""
    return _mode is not None


def install() -> None:
    """Make host memory pose as CUDA memory from now on in this process and thread. Idempotent.

    Raises:
        RuntimeError: CUDA was already initialised in this process: tensors on the real device may exist.
    """
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "the simulated accelerator can't start: CUDA is already initialised in this process; "
            "set dist.device=cuda, or dist.device=cpu before anything touches torch.cuda"
        )

    # Compiled code would need a C++ toolchain on the user's machine and would not see the simulated device.
    importlib.import_module("torch._dynamo").config.disable = True
    # Core's tracker warns when device randomness moves the host's generator; here they are one generator.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    matrix_products.install()
    _replace()
    _mode = _SimulatedDevice()
    _mode.__enter__()


def enter_thread() -> None:
    """Make host memory pose as CUDA memory in this thread too, until it ends. `install` is the main thread's."""
    assert _mode is not None, "the simulated accelerator is not installed"
    _mode.__enter__()


def _replace() -> None:
    for owner, name, stand_in in _replacements():
        _originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, stand_in)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as a host tensor. Needed for memory that torch didn't allocate."""
    return _mark_host(tensor)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Within the context, tensors of device and host have shape, dtype and side, but no memory.

    For planning runs that are larger than this machine. The simulated accelerator must be installed.
    """
    mode = _mode
    assert mode is not None, "the simulated accelerator is not installed"
    mode.holds_data = False
    try:
        with torch.device("meta"):
            yield
    finally:
        mode.holds_data = True


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Stock torch within the context, for code that must not see the simulated device, such as a Hugging Face model.

    The overrides of matrix products stay active.
    """
    if _mode is None or not _mode.enabled:
        yield
        return
    _mode.enabled = False
    # Leave the mode if possible: one that only forwards calls costs microseconds for each. Under another mode it stays.
    is_on_top = torch.overrides._get_current_function_mode() is _mode
    if is_on_top:
        _mode.__exit__(None, None, None)
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    try:
        yield
    finally:
        _replace()
        if is_on_top:
            _mode.__enter__()
        _mode.enabled = True
