# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of context parallelism."""

from tests.mutants.changes import condition, expression, without_call
from tests.mutants.rows.mutant import Mutant

_UNIT = "tests/unit_tests/models/test_context_parallel.py::test_"
_RUNS = "tests/functional_tests/test_context_parallel.py::test_"

CONTEXT = (
    Mutant(
        name="context: chunks in their order",
        breaks="a rank has other tokens than the positions that Core rotates them by",
        where="megatron.bridge.models.context_parallel:positions_of_rank",
        change=expression("2 * size - 1 - rank", "size + rank"),
        tests=(f"{_UNIT}positions_are_those_that_core_rotates_by",),
    ),
    Mutant(
        name="context: packed rows cut as one sample",
        breaks="a rank has other tokens than the chunks of each sample that attention takes them for",
        where="megatron.bridge.models.context_parallel:cut_for_this_rank",
        change=condition("cu_seqlens", becomes="True"),
        tests=(f"{_UNIT}each_row_is_cut_where_its_samples_end",),
    ),
    Mutant(
        name="context: a mean over a part of the row",
        breaks="tokens of a rank with few of them count more",
        where="megatron.bridge.training.shared_rows:_over_all_ranks",
        change=without_call("all_reduce"),
        tests=(f"{_RUNS}packed_rows_and_experts_on_two_ranks",),
    ),
    Mutant(
        name="context: whole rows pass",
        breaks="a script's forward step trains each rank on the whole row, with positions of a longer one",
        where="megatron.bridge.training.shared_rows:_check_rows_are_cut",
        change=condition("found"),
        tests=(f"{_RUNS}a_forward_step_that_cuts_no_rows_is_named",),
    ),
    Mutant(
        name="context: one rank's random states",
        breaks="expert-parallel ranks that share rows all resume with the random states of the first",
        where="megatron.bridge.training.run_state.rng:get_rng_state",
        change=expression("mpu.get_data_parallel_group(with_context_parallel=True)", "mpu.get_data_parallel_group()"),
        tests=(f"{_RUNS}each_expert_parallel_rank_keeps_its_random_states",),
    ),
    Mutant(
        name="context: the length of a part",
        breaks="ranks that share rows turn by rotary frequencies of different lengths",
        where="megatron.bridge.models.rope_by_length:RotaryByLength._length",
        change=without_call("all_reduce"),
        tests=(
            "tests/unit_tests/models/test_rope_by_length.py::"
            "test_ranks_that_share_rows_turn_by_the_longest_sample_of_all",
        ),
    ),
)
