# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""After some steps, say how long the optimizer took beside what its placement was expected to take."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron.bridge.offload_engine.placement import Choice
from megatron.bridge.utils import device

logger = logging.getLogger(__name__)

NOT_COUNTED, COUNTED = 3, 5
"""Steps. The first ones allocate memory."""


def report_what_was_met(hybrids: Sequence[torch.optim.Optimizer], choice: Choice) -> None:
    """Time the optimizer's first steps by events on the device, and log them once.

    Args:
        hybrids: This rank's, which step one after the other.
        choice: What was expected.
    """
    began: list[float] = []
    events: list[tuple[Any, Any]] = []
    hooks: list[Any] = []

    def before(optimizer: Any, *_: Any) -> None:
        if optimizer is hybrids[0]:
            began.append(time.perf_counter())
            if len(began) > NOT_COUNTED + COUNTED:
                _log(choice, began, events)
                for hook in hooks:
                    hook.remove()
                return
        if len(began) > NOT_COUNTED:
            events.append((device.timed_event(), device.timed_event()))
            events[-1][0].record()

    def after(*_: Any) -> None:
        if NOT_COUNTED < len(began) <= NOT_COUNTED + COUNTED:
            events[-1][1].record()

    for hybrid in hybrids:
        hooks += [hybrid.register_step_pre_hook(before), hybrid.register_step_post_hook(after)]


def _log(choice: Choice, began: list[float], events: list[tuple[Any, Any]]) -> None:
    device.synchronize()
    optimizer = sum(start.elapsed_time(end) for start, end in events) / 1000 / COUNTED
    step = (began[-1] - began[NOT_COUNTED]) / COUNTED
    logger.info(
        "optimizer placement: predicted %.0f ms for the optimizer, met %.0f ms (%+.0f%%) in steps %d to %d, which took "
        "%.0f ms each (rank 0)",
        1000 * choice.seconds,
        1000 * optimizer,
        100 * (optimizer / choice.seconds - 1),
        NOT_COUNTED + 1,
        NOT_COUNTED + COUNTED,
        1000 * step,
    )
