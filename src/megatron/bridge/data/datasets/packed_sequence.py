# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of `PackedSequenceSpecs`."""

from megatron.bridge.data.sft_options import PackedSequenceSpecs

__all__ = ["PackedSequenceSpecs"]
