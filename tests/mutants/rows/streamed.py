# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of streamed state, its waits left out, and of the placement that a run settles by itself."""

from tests.mutants.changes import Change, expression, moved, returning, without_call
from tests.mutants.rows.mutant import Mutant

_BITS = "tests/functional_tests/test_streamed_state.py::test_the_bits_are_those_without_offload_in_any_order"

_UNITS = "tests/unit_tests/offload_engine/test_"


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
        "no wait for the whole way down",
        "the next piece waits for the copy before it",
        "streamed_state:Pipeline.step",
        moved("record_event", before="wait_stream"),
    ),
    _mutant(
        "no wait of the host",
        "the host reads, saves or loads over what is still on its way",
        "streamed_state:Pipeline.wait",
        without_call("synchronize"),
    ),
    _mutant(
        "no wait at the end of a step",
        "the host reads, saves or loads over what is still on its way",
        "streamed_step:StreamedStep._sync_sub_optimizers_state_to_hdo",
        without_call("wait"),
    ),
    _mutant(
        "the host's kernel",
        "state that is to be streamed is stepped on by the host, which rounds otherwise",
        "streamed_step:_count_first",
        returning("0"),
    ),
    *(
        Mutant(
            f"placement, a measurement that {what}",
            "an option's cost is taken for another's",
            "megatron.bridge.offload_engine.ceilings:_seconds",
            without_call("synchronize", at=at),
            (f"{_UNITS}ceilings.py::test_a_measurement_begins_and_ends_where_nothing_else_is_under_way",),
        )
        for at, what in enumerate(("begins too early", "ends too early", "leaves copies under way"))
    ),
    *(
        Mutant(
            f"placement, {what}",
            "what was met can't be read",
            f"megatron.bridge.offload_engine.met:{where}",
            without_call(call),
            (f"{_UNITS}met.py::test_times_are_read_once_the_device_is_there_and_once",),
        )
        for what, where, call in (
            ("no beginning", "report_what_was_met.before", "record"),
            ("no end", "report_what_was_met.after", "record"),
            ("no wait for the end", "_log", "synchronize"),
        )
    ),
    Mutant(
        "placement, a resume",
        "a resume places the optimizer as if it were new, and on a GPU rounds otherwise than the run that saved",
        "megatron.bridge.training.run_state.offload_placement:_recorded",
        returning("None"),
        ("tests/functional_tests/test_offload_placement.py::test_it_is_settled_once_recorded_kept_and_reported",),
    ),
    Mutant(
        "placement, the rank with the least room",
        "a placement that fits one rank is taken, and another runs out of memory",
        "megatron.bridge.offload_engine.placement:choose",
        expression("all", "any"),
        ("tests/unit_tests/offload_engine/test_placement.py::test_the_rank_with_the_least_room_decides_for_all",),
    ),
)
