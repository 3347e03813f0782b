# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Streams and events as CUDA promises them and no better: the order in which a device's queued work may run.

Work of one stream runs in the order of its issue. Between streams, and between a stream and the host, nothing is
ordered but by the waits that the program asks for. An `Order` picks one of the legal orders, to the program's harm.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

HOST_FIRST, DEFAULT_FIRST, SIDES_FIRST = "host first", "default stream first", "side streams first"
ORDERS: tuple[str | int, ...] = (HOST_FIRST, DEFAULT_FIRST, SIDES_FIRST, 1, 2)
"""Who runs ahead of the others, as far as waits let it: the host, the default stream or the others; or a seed."""


class Point(NamedTuple):
    """A place in a stream: behind that many of its tasks."""

    stream: "Stream"
    number: int

    @property
    def is_reached(self) -> bool:
        return self.stream.num_done >= self.number


class Stream:
    """A queue of work. Takes the place of `torch.cuda.Stream`, made for the device that is in force."""

    cuda_stream = 0
    device_in_force: "Device | None" = None

    def __init__(self, *args: Any, device: Any = None, of: "Device | None" = None, **kwargs: Any) -> None:
        self.owner = of or Stream.device_in_force
        self.tasks: deque[Point | Callable[[], None]] = deque()
        self.num_issued = self.num_done = 0
        if self.owner is not None:
            self.owner.streams.append(self)

    def issue(self, task: Point | Callable[[], None]) -> None:
        """Queue work, or a wait for a place in another stream."""
        self.move_to_device_in_force()
        if self.is_left_over:
            if not isinstance(task, Point):
                task()
            return
        if self.owner is not None:
            self.owner.before_issue()
        self.tasks.append(task)
        self.num_issued += 1
        if self.owner is not None:
            self.owner.run_ahead()

    def move_to_device_in_force(self) -> None:
        """Belong to it, though made for an earlier one, which has run all that it was given."""
        device = Stream.device_in_force
        if device is not None and self.owner is not device:
            self.owner = device
            device.streams.append(self)

    @property
    def is_left_over(self) -> bool:
        """Whether its device is over. What Core keeps in a class is used later; then it orders nothing."""
        return Stream.device_in_force is None and self.owner is not None and self.owner.is_over

    @property
    def here(self) -> Point:
        """Behind all that was issued so far."""
        return Point(self, self.num_issued)

    @property
    def can_run(self) -> bool:
        """Whether there is work that waits for no other stream."""
        return bool(self.tasks) and (not isinstance(self.tasks[0], Point) or self.tasks[0].is_reached)

    def run_one(self) -> None:
        """The next task, which waits for nothing."""
        task = self.tasks.popleft()
        if not isinstance(task, Point):
            task()
        self.num_done += 1

    def run_to(self, number: int) -> None:
        """What the host waits for: no more than is needed for it."""
        while self.num_done < number:
            if self.can_run:
                self.run_one()
                if self.owner is not None:
                    self.owner.run_ahead()
            else:
                waits_for = self.tasks[0]
                assert isinstance(waits_for, Point)
                waits_for.stream.run_to(waits_for.number)

    # What torch.cuda.Stream has.

    def wait_stream(self, other: "Stream") -> None:
        if not self.is_left_over:
            self.issue(other.here)

    def wait_event(self, event: Any) -> None:
        if not self.is_left_over:
            event.wait(self)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.run_to(self.num_issued)

    def query(self) -> bool:
        return self.here.is_reached or self._let_time_pass()

    def _let_time_pass(self) -> bool:
        """A program that asks again and again gets there in the end."""
        self.run_to(self.num_done + 1)
        return False


class Event:
    """A place in a stream, once recorded. Takes the place of `torch.cuda.Event`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._point: Point | None = None
        self._time_seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        if stream is None:
            assert Stream.device_in_force is not None, "no adversarial streams are in force"
            stream = Stream.device_in_force.current
        self._point, self._time_seconds = stream.here, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        if stream is None:
            assert Stream.device_in_force is not None, "no adversarial streams are in force"
            stream = Stream.device_in_force.current
        if self._point is not None:
            stream.issue(self._point)

    def synchronize(self) -> None:
        if self._point is not None:
            self._point.stream.run_to(self._point.number)

    def query(self) -> bool:
        return self._point is None or self._point.is_reached or self._point.stream._let_time_pass()

    def elapsed_time(self, end: "Event") -> float:
        if not all(event._point is not None and event._point.is_reached for event in (self, end)):
            raise RuntimeError("an event was not recorded or is not reached yet")
        return (end._time_seconds - self._time_seconds) * 1e3


class Device:
    """The streams of a device, and the order that is chosen among the legal ones."""

    def __init__(self, order: str | int) -> None:
        assert order in (HOST_FIRST, DEFAULT_FIRST, SIDES_FIRST) or isinstance(order, int), f"no order {order!r}"
        self.order = order
        self.streams: list[Stream] = []
        self.default = self.current = Stream(of=self)
        self._random = random.Random(order)
        self._is_running = False
        self.before_issue: Callable[[], None] = lambda: None
        self.is_over = False
        """Whether it was in force, all its work is done, and no more of it is simulated."""

    def runs_at_once(self, stream: Stream) -> bool:
        """Whether work for a stream would run before it is issued."""
        is_ahead = self.order == (DEFAULT_FIRST if stream is self.default else SIDES_FIRST)
        return is_ahead and not stream.tasks

    def run_ahead(self) -> None:
        """Let those run that the order puts ahead of the others."""
        if self._is_running or self.order == HOST_FIRST:
            return
        self._is_running = True
        try:
            if isinstance(self.order, int):
                while (ready := [stream for stream in self.streams if stream.can_run]) and self._random.random() < 0.5:
                    self._random.choice(ready).run_one()
            else:
                ahead = [stream for stream in self.streams if (stream is self.default) == (self.order == DEFAULT_FIRST)]
                while ready := [stream for stream in ahead if stream.can_run]:
                    ready[0].run_one()
        finally:
            self._is_running = False

    def synchronize(self, streams: Iterable[Stream] | None = None) -> None:
        """Run all there is."""
        for stream in list(self.streams if streams is None else streams):
            stream.synchronize()
