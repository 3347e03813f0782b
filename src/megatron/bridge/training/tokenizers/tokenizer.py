# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of tokenizers."""

from megatron.bridge.data.tokenizer import HuggingFaceTokenizer, NullTokenizer, Tokenizer, build_tokenizer

__all__ = ["HuggingFaceTokenizer", "MegatronTokenizer", "NullTokenizer", "build_tokenizer"]

MegatronTokenizer = Tokenizer
"""Any of them, for annotations and `isinstance`."""
