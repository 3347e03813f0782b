# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The simulated accelerator with streams that can be wrong: where a wait is missing, the bits are others.

Inside `adversarial_streams(order)`, work on device tensors is queued on the current stream, copies with
`non_blocking=True` among it, and runs as late, or as early, as `device_queues.py` lets it: where the host waits
(`synchronize`, `.item()`, `.cpu()`, …), and in between as the order says. Until then its outputs hold what they held
before; new ones NaN, or -1. Work on host tensors runs at once, on the bytes that are there.

Some waits here are stricter than CUDA's: collectives, random numbers, and results whose shape depends on values wait
for the current stream. So no alarm is false, but a missing wait may go unseen around these. Memory that is given back
before another stream has read it is overwritten (`freed_memory.py`). Not simulated: work of other threads, but for that
of an overlapped step (`late_worker.py`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron.bridge.offload_engine.overlap import worker
from megatron.bridge.utils import simulated_accelerator
from tests.rigs.device_queues import Device, Event, Stream
from tests.rigs.freed_memory import FreedMemory
from tests.rigs.late_worker import LateWorker

aten: Any = torch.ops.aten
_HOST_MARK = simulated_accelerator._HOST_MARK
_COPIES = (aten.copy_.default, aten._foreach_copy_.default)
_METADATA = {"empty_like", "new_empty", "new_empty_strided", "set_", "resize_", "resize_as_", "_resize_output_"}
"""Names of operations that neither read nor write elements."""
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_READ_BY_THE_HOST = (
    *(torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__repr__, torch.Tensor.storage),
    *(torch.Tensor.untyped_storage, torch.Tensor.__reduce_ex__, torch.Tensor.__deepcopy__),
    *(torch.tensor, torch.as_tensor),
)
"""They read memory past torch's dispatcher."""
_DEVICE_OF: Any = torch.Tensor.device.__get__
_THE_DEVICE = torch.device("cpu", 0)
"""What a device tensor says where it lies. The simulation says `cpu` on both sides, and so takes what is made with
`device=tensor.device` for host memory, which isn't queued. The index tells the two apart, and torch takes either."""


def _is_host(tensor: torch.Tensor) -> bool:
    return getattr(tensor, _HOST_MARK, False)


def _mark_host(tensor: torch.Tensor) -> None:
    setattr(tensor, _HOST_MARK, True)


def _tensors(nested: Any) -> list[torch.Tensor]:
    """Those among arguments or results of an operation, where torch's own trees would take most of the time."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, list | tuple):
        return []
    return [tensor for one in nested for tensor in _tensors(one)]


def _mapped(fn: Callable[[torch.Tensor], torch.Tensor], nested: Any) -> Any:
    """The same with other tensors."""
    if isinstance(nested, torch.Tensor):
        return fn(nested)
    if isinstance(nested, dict):
        return {name: _mapped(fn, one) for name, one in nested.items()}
    return type(nested)([_mapped(fn, one) for one in nested]) if isinstance(nested, list | tuple) else nested


def _spoil(tensor: torch.Tensor) -> None:
    """What memory holds that nobody has written yet."""
    if tensor.numel():
        is_real = tensor.is_floating_point() or tensor.is_complex()
        aten.fill_.Scalar(tensor, float("nan") if is_real else True if tensor.dtype == torch.bool else -1)


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    zeros = aten.empty_strided.default(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return aten.zero_.default(zeros)


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Inside, torch computes at once, below autograd, and no mode looks on."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class _Queueing(TorchDispatchMode):
    """Queues what touches device tensors."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self.freed = FreedMemory(device.default)
        device.before_issue = self.freed.look
        self.is_host_copy = False
        """Whether the operation on its way is the copy of a `.cpu()`, for which the host waits."""
        self.is_end_of_collective = False
        """Whether it is a collective's own: gloo leaves the end of a reduce-scatter to the wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunction():
            self.freed.look()
            result = self._dispatched(func, args, kwargs or {})
            self.freed.made(_new_tensors(func, result), self._device.current)
            return result

    def _dispatched(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensors, stream = _tensors((args, kwargs)), self._device.current
        if all(map(_is_host, tensors)):  # or a new tensor
            result = func(*args, **kwargs)
            if tensors:
                for tensor in _tensors(result):
                    _mark_host(tensor)
            return result
        if _is_of_metadata(func) or self._device.runs_at_once(stream):
            return func(*args, **kwargs)
        if self.is_host_copy or self.is_end_of_collective or _host_waits(func, args):
            stream.synchronize()
            return func(*args, **kwargs)
        return self._queued(stream, func, args, kwargs)

    def _queued(self, stream: Stream, func: Any, args: tuple, kwargs: dict) -> Any:
        waits = False
        if func in _COPIES:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            to_host = any(map(_is_host, _tensors(args[0])))
            waits = to_host and not non_blocking
            by_value = not non_blocking
        else:
            waits = any(map(_is_host, _written(func, args, kwargs)))
            by_value = True
        if waits:
            stream.synchronize()
            return func(*args, **kwargs)

        held: list[torch.Tensor] = []

        def captured(tensor: torch.Tensor) -> torch.Tensor:
            """The memory of now; of the host, where it may be overwritten at once, the bytes of now."""
            if by_value and _is_host(tensor):
                return aten.clone.default(tensor)
            alias = aten.alias.default(tensor)
            held.extend([] if _is_host(tensor) else [alias])
            return alias

        later_args, later_kwargs = _mapped(captured, (args, kwargs))
        result, new = _promised(func, args, kwargs)

        def run() -> None:
            with _unseen():
                computed = func(*later_args, **later_kwargs)
                for place, value in zip(new, _fresh(func, computed), strict=True):
                    aten.copy_.default(place, value)
                self.freed.release(held, stream)

        held += new
        self.freed.made(new, stream)
        self.freed.hold(held, stream)
        stream.issue(run)
        return result


@functools.cache
def _is_of_metadata(func: Any) -> bool:
    """Whether an operation touches no elements: views, and what reserves memory."""
    returns = func._schema.returns
    is_view = bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return is_view or func._opname in _METADATA


def _host_waits(func: Any, args: tuple) -> bool:
    """Whether the host needs values to continue, or the simulation to keep the order of what isn't the device's."""
    if func._opname in _INDEXED:  # only masks make shapes of values
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))
    return _host_waits_for(func)


@functools.cache
def _host_waits_for(func: Any) -> bool:
    if func.namespace == "c10d" or torch.Tag.nondeterministic_seeded in func.tags:
        return True
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return True
    return not all(isinstance(one.type, torch.TensorType | torch.ListType) for one in func._schema.returns)


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that an operation writes."""
    return _tensors([_given(at, one, args, kwargs) for at, one in _arguments_written(func)])


@functools.cache
def _arguments_written(func: Any) -> list[tuple[int, Any]]:
    return [(at, one) for at, one in enumerate(func._schema.arguments) if _is_write(one)]


def _is_write(one: Any) -> bool:
    return one.alias_info is not None and one.alias_info.is_write


def _given(at: int, argument: Any, args: tuple, kwargs: dict) -> Any:
    return args[at] if at < len(args) else kwargs.get(argument.name)


def _promised(func: Any, args: tuple, kwargs: dict) -> tuple[Any, list[torch.Tensor]]:
    """What an operation returns before it has run, and its new tensors, which hold nothing yet."""
    returns = func._schema.returns
    new: list[torch.Tensor] = []
    found: Any = [None] * len(returns)
    if not all(map(_is_write, returns)):
        # The shapes come from a trial on zeros: values may be out of range before their time.
        dummies = _mapped(_zeros_like, (args, kwargs))
        computed = func(*dummies[0], **dummies[1])
        found = [computed] if len(returns) == 1 else list(computed)
        new = _fresh(func, computed)
        for tensor in new:
            _spoil(tensor)
        new = [aten.alias.default(tensor) for tensor in new]
    for at, one in enumerate(returns):
        if _is_write(one):
            names = one.alias_info.before_set
            place, argument = next(
                (place, argument)
                for place, argument in enumerate(func._schema.arguments)
                if _is_write(argument) and argument.alias_info.before_set == names
            )
            found[at] = _given(place, argument, args, kwargs)
    return None if not returns else found[0] if len(returns) == 1 else tuple(found), new


def _fresh(func: Any, computed: Any) -> list[torch.Tensor]:
    """Of what an operation returned, the tensors that weren't there before."""
    returns = func._schema.returns
    values = [computed] if len(returns) == 1 else list(computed or ())
    return [
        tensor for one, value in zip(returns, values, strict=True) if not _is_write(one) for tensor in _tensors([value])
    ]


def _new_tensors(func: Any, result: Any) -> list[torch.Tensor]:
    """Of what an operation returned, the device tensors in memory of their own."""
    returns = func._schema.returns
    values = [result] if len(returns) == 1 else list(result or ())
    of_own = [value for one, value in zip(returns, values, strict=True) if one.alias_info is None]
    return [tensor for tensor in _tensors(of_own) if not _is_host(tensor)]


class _HostReads(TorchFunctionMode):
    """Lets the host wait where it reads a device tensor other than by torch's dispatcher."""

    def __init__(self, device: Device, queueing: _Queueing) -> None:
        super().__init__()
        self._device, self._queueing = device, queueing

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        subject = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func == _DEVICE_OF:
            return func(*args, **kwargs) if _is_host(args[0]) else _THE_DEVICE
        args = tuple(map(_as_asked_for, args))
        kwargs = {name: _as_asked_for(one) for name, one in kwargs.items()}
        if func is torch.Tensor.is_pinned:
            return subject is not None and _is_host(subject)
        if func is torch.Tensor.__deepcopy__:  # torch copies the storage, which doesn't say on which side it is
            copy = args[1][id(subject)] = args[0].detach().clone().requires_grad_(args[0].requires_grad)
            return copy
        if func in _READ_BY_THE_HOST and not all(map(_is_host, _tensors(args))):
            self._device.synchronize()
        waits = func is torch.Tensor.cpu or (func is torch.Tensor.to and not _is_non_blocking(args, kwargs))
        if not waits:
            return func(*args, **kwargs)
        before, self._queueing.is_host_copy = self._queueing.is_host_copy, _goes_to_host(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self._queueing.is_host_copy = before


def _as_asked_for(argument: Any) -> Any:
    return "cuda" if isinstance(argument, torch.device) and argument == _THE_DEVICE else argument


def _is_non_blocking(args: tuple, kwargs: dict) -> bool:
    return bool(kwargs.get("non_blocking")) or any(one is True for one in args[1:])


def _goes_to_host(func: Any, args: tuple, kwargs: dict) -> bool:
    if func is torch.Tensor.cpu:
        return True
    named = [*args[1:], kwargs.get("device"), kwargs.get("other")]
    return any(
        _is_host(one) if isinstance(one, torch.Tensor) else simulated_accelerator._named_device(one) == "cpu"
        for one in named
    )


def _simulation_in_force() -> contextlib.AbstractContextManager:
    """The simulation's mode, where torch has set it aside: its own autograd function would put it above ours."""
    mode: Any = simulated_accelerator._mode
    is_in_force = any(one is mode for one in torch.overrides._get_current_function_mode_stack())
    return contextlib.nullcontext() if is_in_force else mode


_MADE_OUTSIDE: dict[type, tuple[str, ...]] = {
    simulated_accelerator._Stream: ("wait_stream", "wait_event", "synchronize", "query", "record_event"),
    simulated_accelerator._Event: ("record", "wait", "synchronize", "query"),
}
"""What Core keeps in a class, as its token dispatchers do, may have been made before, and is used later."""


def adopted(made_outside: Any) -> Any:
    """The stream or event that stands for one that was made outside."""
    if isinstance(made_outside, Stream):
        made_outside.move_to_device_in_force()
    if not isinstance(made_outside, tuple(_MADE_OUTSIDE)):
        return made_outside
    stand_in = vars(made_outside).get("_adversarial")
    if stand_in is None:
        kind = Stream if isinstance(made_outside, simulated_accelerator._Stream) else Event
        stand_in = made_outside._adversarial = kind()
    return adopted(stand_in)


def _as_if_made_inside(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(adopted(self), name)(*map(adopted, args))


@contextlib.contextmanager
def adversarial_streams(order: str | int) -> Iterator[Device]:
    """Inside, streams and events order only what they promise to. At the end all work is done.

    What holds the default stream, such as a `HybridDeviceOptimizer`, must be made inside.

    Args:
        order: One of `device_queues.ORDERS`, or another seed.

    Yields:
        The device, whose streams can be looked at.
    """
    assert simulated_accelerator.is_installed(), "only the simulated accelerator has adversarial streams"
    assert Stream.device_in_force is None, "adversarial streams are in force already"
    device = Device(order)
    queueing = _Queueing(device)
    reads = _HostReads(device, queueing)
    run_backward = torch.autograd._engine_run_backward

    @contextlib.contextmanager
    def stream_context(stream: Any) -> Iterator[None]:
        before, device.current = device.current, device.current if stream is None else adopted(stream)
        try:
            yield
        finally:
            device.current = before

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        with torch._C.DisableTorchFunction():
            queueing.freed.record(tensor, adopted(stream))

    wait_for_collective = torch.distributed.Work.wait

    def wait(work: Any, *args: Any) -> Any:
        before, queueing.is_end_of_collective = queueing.is_end_of_collective, True
        try:
            return wait_for_collective(work, *args)
        finally:
            queueing.is_end_of_collective = before

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _simulation_in_force(), reads:
            return run_backward(*args, **kwargs)

    stand_ins: dict[str, Callable[..., Any]] = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: device.current,
        "default_stream": lambda *_: device.default,
        "stream": stream_context,
        "set_stream": lambda stream: setattr(device, "current", adopted(stream)),
        "synchronize": lambda *_: device.synchronize(),
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for kind, methods in _MADE_OUTSIDE.items():
            for name in methods:
                stack.enter_context(mock.patch.object(kind, name, _as_if_made_inside(name)))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", record_stream))
        stack.enter_context(mock.patch.object(torch.distributed.Work, "wait", wait))
        stack.enter_context(mock.patch.object(worker, "HostWorker", lambda *_: LateWorker(order)))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(mock.patch.object(Stream, "device_in_force", device))
        stack.enter_context(queueing)
        stack.enter_context(reads)
        yield device
        device.synchronize()
    device.is_over = True
