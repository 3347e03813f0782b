# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants by subject: what is broken, by which change, and the smallest tests that must notice it.

`python -m tests.mutants` applies them.
"""

from tests.mutants.rows import (
    adapters,
    context,
    conversion,
    data,
    files,
    load,
    memory,
    offload,
    overlap,
    resume,
    runs,
    streamed,
    sync,
)

MUTANTS = (
    *sync.THE_SYNC,
    *sync.THE_GUARD,
    *load.THE_LOAD,
    *resume.THE_REPAIRS,
    *offload.THE_FLAT_STEP,
    *offload.THE_STATE_FORMATS,
    *offload.THE_SPLIT_MASTERS,
    *offload.THE_WAITS,
    *overlap.OVERLAP,
    *resume.THE_RESUME,
    *streamed.STREAMED,
    *conversion.THE_CONVERSION,
    *adapters.ADAPTERS,
    *data.THE_DATA,
    *context.CONTEXT,
    *files.THE_FILES,
    *memory.MEMORY,
    *runs.RUNS,
)
