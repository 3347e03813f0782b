# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Hooks into a run: subclass `Callback`, override what you need, pass it to `finetune` or `pretrain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.distributed import all_gathered


@dataclass(frozen=True, kw_only=True)
class TakenStep:
    """The metrics that every step has."""

    losses: dict[str, float]
    learning_rate: float
    is_skipped: bool
    seconds: float
    tokens_per_second: float


@dataclass
class CallbackContext:
    """What a callback gets. A field is None if the event has no value for it."""

    state: GlobalState
    model: list[torch.nn.Module]
    optimizer: Any = None
    scheduler: Any = None
    user_state: dict[str, Any] = field(default_factory=dict)
    """Free for callbacks to store objects in; it lives as long as the run."""

    loss_dict: dict[str, float] | None = None
    """Losses of the step just taken, or mean losses of an evaluation."""

    router_losses: dict[str, float] = field(default_factory=dict)
    """Losses that the experts' routers added in the step just taken: means over layers, without coefficients."""

    router_losses_by_layer: dict[str, float] = field(default_factory=dict)
    """The same for each layer, with `model.moe_per_layer_logging`."""

    learning_rate: float | None = None
    """Learning rate of the step just taken."""

    fp16_loss_scale: float | None = None
    """Loss scale of the step just taken; FP16 only."""

    grad_norm: float | None = None
    grad_norms: dict[str, float] = field(default_factory=dict)
    """L2 norm of each parameter's gradient in the step just taken, before clipping, by its name in the whole model;
    with `logger.log_l2_norm_grad_to_tensorboard`."""

    num_zeros_in_grad: int | None = None
    """Elements of all gradients that were 0 in the step just taken; with `logger.log_num_zeros_in_grad`."""

    skipped_iter: bool | None = None
    """Whether the step just taken changed nothing: a gradient was not finite, or the norm above Core's threshold."""

    figures: dict[str, float] = field(default_factory=dict)
    """Figures of the step just taken that `logger` asks for: throughput, norm of the weights and so on."""

    num_tokens: int | None = None
    """Tokens in the loss of the step just taken, over all ranks."""

    step_seconds: float | None = None
    """Wall-clock time of the step just taken."""

    tokens_per_second: float | None = None
    """All tokens of the step just taken per second, prompts and padding included. Estimated as this rank's tokens times
    the data-parallel size."""

    @property
    def taken_step(self) -> TakenStep:
        """The step just taken, with no field None.

        Raises:
            RuntimeError: This event has no step.
        """
        figures = {
            "losses": self.loss_dict,
            "learning_rate": self.learning_rate,
            "is_skipped": self.skipped_iter,
            "seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        if missing := [name for name, figure in figures.items() if figure is None]:
            raise RuntimeError(f"no step was taken ({missing[0]} is None): ask in on_train_step_end")
        values: dict[str, Any] = figures
        return TakenStep(**values)


class Callback:
    """Override the events you need. They are called on every rank, in the order in which callbacks were passed."""

    reads_weights: ClassVar[bool] = True
    """Whether its events may read weights or the optimizer's state. If false, weights that come later
    (`optimizer.overlap_cpu_optimizer_step`, `ddp.overlap_param_gather`) aren't waited for before they are called."""

    def on_data_init_start(self, context: CallbackContext) -> None:
        """The process groups are up; tokenizer and data come next, then the model: `context.model` is empty."""

    def on_train_start(self, context: CallbackContext) -> None: ...
    def on_train_step_start(self, context: CallbackContext) -> None: ...
    def on_train_step_end(self, context: CallbackContext) -> None: ...
    def on_train_end(self, context: CallbackContext) -> None: ...
    def on_eval_start(self, context: CallbackContext) -> None: ...
    def on_eval_step_start(self, context: CallbackContext) -> None: ...
    def on_eval_step_end(self, context: CallbackContext) -> None: ...
    def on_eval_end(self, context: CallbackContext) -> None: ...
    def on_test_start(self, context: CallbackContext) -> None: ...
    def on_test_step_start(self, context: CallbackContext) -> None: ...
    def on_test_step_end(self, context: CallbackContext) -> None: ...
    def on_test_end(self, context: CallbackContext) -> None: ...
    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """A persistent checkpoint is complete on disk. With `checkpoint.async_save` that is some steps later."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class CallbackManager:
    """Calls a run's callbacks and registered functions, in the order in which they were added."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self.callbacks: list[Callback] = []
        self.user_state: dict[str, Any] = {}
        """What callbacks see as `context.user_state`."""
        self._waits_before: set[str] = set()
        self._wait: Callable[[], None] = lambda: None
        self.add(callbacks)

    @property
    def events(self) -> frozenset[str]:
        """The events that there are."""
        return frozenset(EVENTS)

    def add(self, callback: Callback | Sequence[Callback]) -> None:
        """Append a callback, or several.

        Raises:
            ValueError: One is not a `Callback`.
        """
        for added in [callback] if isinstance(callback, Callback) else callback:
            if not isinstance(added, Callback):
                raise ValueError(
                    f"callbacks holds a {type(added).__name__}: expected instances of "
                    "megatron.bridge.training.callbacks.Callback"
                )
            self.callbacks.append(added)

    def register(self, event_name: str, fn: Callable[[CallbackContext], None]) -> None:
        """Call a function at one event.

        Args:
            event_name: A name in `EVENTS`.
            fn: Gets the context.

        Raises:
            ValueError: No event of this name.
        """
        _check_event(event_name)
        self.callbacks.append(_RegisteredFunction(event_name, fn))

    def list_callbacks(self, event_name: str) -> list[Callable[[CallbackContext], None]]:
        """What is called at an event, in order: registered functions, and methods that a callback overrides.

        Raises:
            ValueError: No event of this name.
        """
        _check_event(event_name)
        called: list[Callable[[CallbackContext], None]] = []
        for callback in self.callbacks:
            if isinstance(callback, _RegisteredFunction):
                called += [callback.function] if callback.event == event_name else []
            elif getattr(type(callback), event_name) is not getattr(Callback, event_name):
                called.append(getattr(callback, event_name))
        return called

    def wait_before_reads(self, wait: Callable[[], None]) -> None:
        """From now on, wait before each event in which a callback of some rank reads weights. Collective.

        Args:
            wait: Waits until all weights are there. It may be collective.
        """
        own = {event for event in EVENTS for callback in self.callbacks if _reads_at(callback, event)}
        self._waits_before, self._wait = set().union(*all_gathered(own)), wait

    def fire(self, event: str, context: CallbackContext) -> None:
        """Call one event on all callbacks.

        Args:
            event: A name in `EVENTS`.
            context: What they get.
        """
        context.user_state = self.user_state
        if event in self._waits_before:
            self._wait()
        for called in self.list_callbacks(event):
            called(context)


class _RegisteredFunction(Callback):
    """A function that is called at one event."""

    def __init__(self, event: str, function: Callable[[CallbackContext], None]) -> None:
        self.event = event
        self.function = function


def _reads_at(callback: Callback, event: str) -> bool:
    if isinstance(callback, _RegisteredFunction):
        return callback.event == event
    return callback.reads_weights and getattr(type(callback), event) is not getattr(Callback, event)


def _check_event(name: str) -> None:
    if name not in EVENTS:
        raise ValueError(f"no event is named {name!r}: expected one of {', '.join(EVENTS)}")


def should_fire(callback_manager: CallbackManager | None, event_name: str) -> bool:
    """Whether anything is called at an event, and so its context is worth making."""
    return callback_manager is not None and bool(callback_manager.list_callbacks(event_name))


def normalize_callbacks(callbacks: Sequence[Callback] | CallbackManager | None) -> CallbackManager:
    """Make a manager from what users pass: a list of callbacks, a manager, or None.

    Raises:
        ValueError: An element is not a `Callback`.
    """
    return callbacks if isinstance(callbacks, CallbackManager) else CallbackManager(callbacks or ())
