# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the servers import that the ranks of tests and of the soak are forked from, so that no rank has to."""

import gc

import megatron.bridge.training.finetune  # noqa: F401
import tests.soak.rank  # noqa: F401

gc.collect()
gc.freeze()  # Core collects garbage in every save and load, and would look through all modules each time
