# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of what scripts use in datasets of their own."""

__all__ = ["IGNORE_INDEX"]

IGNORE_INDEX = -100
"""The label that transformers and PyTorch's cross-entropy skip. Here `loss_mask` says what is learned."""
