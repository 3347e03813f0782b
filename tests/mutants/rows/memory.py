# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the memory estimate."""

from tests.mutants.changes import condition, expression, returning, value, without_element
from tests.mutants.rows.mutant import Mutant

_HELD = "tests/functional_tests/test_memory_estimate.py::test_the_estimate_is_what_ranks_hold"

MEMORY = (
    Mutant(
        name="memory: one moment of Adam's",
        breaks="the estimate is 4 bytes a parameter too small",
        where="megatron.bridge.training.monitoring.state_memory:MOMENTS",
        change=value("adam", "1"),
        tests=(f"{_HELD}[no offload]",),
    ),
    Mutant(
        name="memory: views of weights counted as masters",
        breaks="precision-aware offload seems to keep what it frees",
        where="megatron.bridge.training.monitoring.state_memory:_Storages.add",
        change=condition("_known", becomes="True"),
        tests=(f"{_HELD}[all, precision-aware]",),
    ),
    Mutant(
        name="memory: gradients on the host forgotten",
        breaks="the host needs a quarter more than the estimate says",
        where="megatron.bridge.training.monitoring.state_memory:count_state",
        change=expression("formats.gradient.itemsize", "0"),
        tests=(f"{_HELD}[all]",),
    ),
    Mutant(
        name="memory: gradients that cross early, as Adam reads them",
        breaks="the estimate is 2 bytes a parameter too large where they are reduced in 16 bits",
        where="megatron.bridge.training.monitoring.state_memory:_bytes_of_early_gradients",
        change=returning("{}"),
        tests=(f"{_HELD}[half, gradients cross early in 16 bits]",),
    ),
    Mutant(
        name="memory: gradients of experts forgotten",
        breaks="spread experts seem to have no gradients",
        where="megatron.bridge.training.monitoring.state_memory:_gradient_buffers",
        change=without_element("expert_parallel_buffers"),
        tests=(f"{_HELD}[EP 2]",),
    ),
)
