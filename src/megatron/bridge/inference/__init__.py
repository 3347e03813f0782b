# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Generating text with a model: command-line options, loading, tokenizer, prompts, and the engine."""
