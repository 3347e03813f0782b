# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Data for training: JSONL files, Megatron-Core's indexed datasets or a user's own, as batches that resume exactly."""
