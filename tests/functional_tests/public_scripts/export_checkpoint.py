# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""From a Megatron checkpoint back to a Hugging Face directory."""

import sys

from megatron.bridge import AutoBridge

hf_model, megatron_path, hf_path = sys.argv[1:]
AutoBridge.from_hf_pretrained(hf_model).export_ckpt(megatron_path, hf_path, show_progress=False)
