# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face weights to Megatron weights and back, one tensor at a time, bit for bit."""
