# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of `TokenizerConfig`."""

from megatron.bridge.data.config import TokenizerConfig

__all__ = ["TokenizerConfig"]
