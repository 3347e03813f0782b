# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the memory estimate."""

from tests.mutants.rows.mutant import Mutant

_STATE = "src/megatron/bridge/training/monitoring/state_memory.py"
_HELD = "tests/functional_tests/test_memory_estimate.py::test_the_estimate_is_what_ranks_hold"

MEMORY = (
    Mutant(
        name="memory: one moment of Adam's",
        breaks="the estimate is 4 bytes a parameter too small",
        file=_STATE,
        text='MOMENTS = {"adam": 2,',
        replacement='MOMENTS = {"adam": 1,',
        tests=(f"{_HELD}[no offload]",),
    ),
    Mutant(
        name="memory: views of weights counted as masters",
        breaks="precision-aware offload seems to keep what it frees",
        file=_STATE,
        text="            if storage._cdata not in self._known:",
        replacement="            if True:",
        tests=(f"{_HELD}[all, precision-aware]",),
    ),
    Mutant(
        name="memory: gradients on the host forgotten",
        breaks="the host needs a quarter more than the estimate says",
        file=_STATE,
        text="            if side is host or (",
        replacement="            if (",
        tests=(f"{_HELD}[all]",),
    ),
    Mutant(
        name="memory: gradients of experts forgotten",
        breaks="spread experts seem to have no gradients",
        file=_STATE,
        text="[*chunk.buffers, *chunk.expert_parallel_buffers]",
        replacement="[*chunk.buffers]",
        tests=(f"{_HELD}[EP 2]",),
    ),
)
