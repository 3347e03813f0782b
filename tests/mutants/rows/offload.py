# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the offloaded step in buckets: its memory, its formats, split masters, and its waits."""

from tests.mutants.changes import Change, condition, expression, moved, value, without_call, without_operand
from tests.mutants.rows.mutant import Mutant


def _flat(what: str, breaks: str, method: str, change: Change) -> Mutant:
    where = f"megatron.bridge.offload_engine.{method}"
    test = "tests/functional_tests/test_flat_step.py::test_the_bits_are_those_of_cores_own_step[precision-aware-serial]"
    return Mutant(f"flat step, {what}", breaks, where, change, (test,))


THE_FLAT_STEP = (
    _flat(
        "tails in the run",
        "gaps are stepped on as parameters, and last elements round otherwise",
        "bucket:Bucket.__init__",
        value("_in_run", "len(params)"),
    ),
    _flat(
        "counters of the run",
        "all but its first parameter stay at step 0",
        "bucket:Bucket.step_lists",
        without_call("_counters_of_run"),
    ),
    _flat(
        "counters that differ",
        "parameters at different steps are stepped on as if at one",
        "adam:FlatAdam._bucket_to_step_on",
        without_operand("counters_agree"),
    ),
    _flat(
        "state that a load left elsewhere",
        "steps continue with the moments from before the load",
        "bucket:Bucket.place",
        without_call("copy_"),
    ),
)


def _formats(what: str, breaks: str, where: str, change: Change, *tests: str) -> Mutant:
    path = "tests/unit_tests/offload_engine/test_state_formats.py::test_"
    return Mutant(
        f"state formats, {what}",
        breaks,
        f"megatron.bridge.offload_engine.{where}",
        change,
        tuple(map(path.__add__, tests)),
    )


THE_STATE_FORMATS = (
    _formats(
        "not handed over",
        "what is asked for in BF16 is kept in FP32",
        "state_formats:keep_state_in",
        condition("are_fp32", becomes="True"),
        "the_bytes_held_are_those_asked_for",
    ),
    _formats(
        "moments not stored",
        "moments in BF16 stay zero",
        "piecewise_adam:step_on_piece",
        without_call("piece.copy_"),
        "pieces_have_the_bits_of_one_call[dtype1]",
    ),
    _formats(
        "parameters without a gradient",
        "they are stepped on with what their gradient's memory holds",
        "adam:FlatAdam._step_in_pieces",
        without_operand("has_all_gradients"),
        "a_run_is_that_in_fp32_with_rounded_moments",
    ),
)


_SPLIT = "tests/unit_tests/offload_engine/test_split_masters.py::test_"
_SAME_BITS, _SEEN = f"{_SPLIT}a_run_has_the_bits_of_fp32_masters", f"{_SPLIT}memory_is_given_back_and_weights_that_"


def _split(what: str, breaks: str, where: str, change: Change, test: str = _SAME_BITS) -> Mutant:
    return Mutant(f"split masters, {what}", breaks, f"megatron.bridge.offload_engine.{where}", change, (test,))


THE_SPLIT_MASTERS = (
    _split(
        "ties rounded down",
        "a master midway between two weights comes back as the one between the next two",
        "split_masters:split",
        condition("is_lost", becomes="True"),
        f"{_SPLIT}weight_and_rest_give_back_every_master[32768]",
    ),
    _split(
        "weights that changed",
        "rests are added to weights that they don't belong to",
        "split_masters:SplitMasters._join_piece",
        condition("checksum"),
        f"{_SEEN}changed_are_seen",
    ),
    _split(
        "memory kept",
        "masters take 6 bytes instead of 2",
        "split_masters:SplitMasters._split",
        without_call("_memory.give_back"),
        f"{_SEEN}changed_are_seen",
    ),
    _split(
        "not joined for a reader",
        "whoever reads masters between steps finds zeros",
        "split_step:SplitStep.prepare_read",
        condition("_is_stepping"),
    ),
    _split(
        "no wait for weights",
        "masters are joined from weights of another piece, and weights overwritten before they have crossed",
        "weight_transit:Passage.wait",
        without_call("synchronize"),
    ),
    _split(
        "no wait for weights that come down",
        "masters are joined from weights of another piece",
        "split_masters:SplitMasters._join_piece",
        without_call("wait"),
    ),
    _split(
        "no wait for weights that go back",
        "weights are overwritten before they have crossed",
        "split_masters:SplitMasters._split_piece",
        without_call("wait"),
    ),
    _split(
        "no wait for the last copy",
        "the host waits for the copy before it",
        "weight_transit:Passage.copy",
        moved("record_event", before="bypass_simulation"),
    ),
    _split(
        "no wait of copies for what changes weights",
        "masters are joined from weights of before a load, and the change goes unseen",
        "split_masters:SplitMasters.join",
        without_call("start_after_current"),
        f"{_SPLIT}weights_that_a_stream_has_yet_to_change_are_seen",
    ),
    _split(
        "no wait before a buffer grows",
        "weights come from memory that was given back",
        "weight_transit:Passage.reserve",
        without_call("wait"),
        f"{_SPLIT}a_buffer_keeps_its_memory_until_it_was_sent",
    ),
)


_ORDER = "tests/functional_tests/test_order_of_streams.py::test_the_step_in_buckets_waits_for_all_it_needs"
_STREAMS = "tests/unit_tests/test_adversarial_streams.py::test_our_waits_order_streams"
_SYNCED = "tests/functional_tests/test_order_of_streams.py::test_runs_load_sync_and_step_the_same"
_OVERLAP = (f"{_ORDER}[default-overlap]", f"{_ORDER}[precision-aware-overlap]")


def _no_wait(what: str, breaks: str, where: str, change: Change, *tests: str) -> Mutant:
    return Mutant(f"no wait, {what}", breaks, f"megatron.bridge.{where}", change, tests)


THE_WAITS = (
    _no_wait(
        "of the host for gradients",
        "Adam steps on gradients that are not on the host yet",
        "offload_engine.step:BucketedStep._send_gradients",
        expression("self._d2h_stream.record_event()", "None"),
        f"{_ORDER}[default-serial]",
    ),
    _no_wait(
        "of weights' readers",
        "what comes after the step reads weights of before it",
        "utils.device:queued_on",
        without_call("wait"),
        *_OVERLAP,
    ),
    _no_wait(
        "of a stream beside for the current one",
        "what the current stream still reads is overwritten",
        "utils.device:queued_on",
        without_call("wait_stream"),
        _STREAMS,
    ),
    _no_wait(
        "for a stream",
        "the current stream doesn't wait when it is told to",
        "utils.device:wait_for_stream",
        without_call("wait_stream"),
        _STREAMS,
    ),
    _no_wait(
        "of the device for its gradients",
        "the device steps on gradients that are not cast yet",
        "core_repairs.gradient_wait:_gradient_wait",
        expression("wait_for_stream(self._d2h_stream)", "None"),
        f"{_ORDER}[precision-aware-overlap]",
    ),
    _no_wait(
        "of the host for copies that a sync wrote",
        "masters are read before the weights are in them",
        "training.cpu_offload.param_copies:rebuild_param_copies",
        without_call("synchronize"),
        f"{_SYNCED}[bf16-dense-TP1-fp32_shards-1.0-serial]",
    ),
)
