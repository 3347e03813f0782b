# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of the adapters that recipes use."""

from megatron.bridge.recipes.common import default_peft_config

__all__ = ["default_peft_config"]
