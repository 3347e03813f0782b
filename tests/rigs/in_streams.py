# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A matrix whose cells run on adversarial streams: `--streams`, and what a rank does for it.

`--streams=late` lets the device work as late as it may, `default-first` and `sides-first` let the default stream or
the others run ahead, `random:SEED` takes any legal order.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.rigs.device_queues import DEFAULT_FIRST, HOST_FIRST, SIDES_FIRST

NAMED = {"late": HOST_FIRST, "default-first": DEFAULT_FIRST, "sides-first": SIDES_FIRST}
BUCKET_ELEMENTS, PIECE_ELEMENTS = 2000, 1024
"""So that a tiny model has several buckets, and a bucket several pieces: they wait for each other."""


def order_of(option: str) -> str | int | None:
    """The order that the option's text asks for; None where it is empty.

    Raises:
        ValueError: It asks for none.
    """
    if not option:
        return None
    kind, _, seed = option.partition(":")
    if kind == "random" and seed.isdecimal():
        return int(seed)
    if option not in NAMED:
        raise ValueError(f"--streams={option}: expected {', '.join(NAMED)}, or random: and a number")
    return NAMED[option]


@contextlib.contextmanager
def streams_in(order: str | int | None) -> Iterator[None]:
    """Adversarial streams and small buckets within the context; nothing where the order is None."""
    if order is None:
        yield
        return
    from megatron.bridge.offload_engine import step, streamed_state
    from megatron.bridge.offload_engine.overlap import early_gradients
    from tests.rigs.adversarial_streams import adversarial_streams

    with (
        mock.patch.object(step, "BUCKET_ELEMENTS", BUCKET_ELEMENTS),
        mock.patch.object(streamed_state, "PIECE_ELEMENTS", PIECE_ELEMENTS),
        mock.patch.object(early_gradients, "NUM_CHECKED_STEPS", 0),  # the check waits, and would hide a missing wait
        adversarial_streams(order),
    ):
        yield


def run_in(order: str | int | None, fn: Callable, *args: Any, **options: Any) -> Any:
    """Call a function on a rank whose streams are adversarial, if an order is given."""
    with streams_in(order):
        return fn(*args, **options)
