# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of state that is streamed through the device: its waits left out, and the host's kernel in its place."""

from tests.mutants.changes import Change, returning, without_call
from tests.mutants.rows.mutant import Mutant

_BITS = "tests/functional_tests/test_streamed_state.py::test_the_bits_are_those_without_offload_in_any_order"


def _mutant(what: str, breaks: str, where: str, change: Change) -> Mutant:
    return Mutant(f"streamed state, {what}", breaks, f"megatron.bridge.offload_engine.{where}", change, (_BITS,))


STREAMED = (
    _mutant(
        "no wait for the way up",
        "the device steps on masters and moments that are not there yet",
        "streamed_state:Pipeline.step",
        without_call("wait_for_stream"),
    ),
    _mutant(
        "no wait for the step",
        "masters and moments of before the step go back to the host",
        "streamed_state:Pipeline.step",
        without_call("wait_stream"),
    ),
    _mutant(
        "no wait for the way down",
        "the next piece overwrites what isn't down yet",
        "streamed_state:Pipeline.step",
        without_call("is_down.wait"),
    ),
    _mutant(
        "no wait of the host",
        "the host reads, saves or loads over what is still on its way",
        "streamed_state:Pipeline.wait",
        without_call("synchronize"),
    ),
    _mutant(
        "the host's kernel",
        "state that is to be streamed is stepped on by the host, which rounds otherwise",
        "streamed_step:_count_first",
        returning("0"),
    ),
)
