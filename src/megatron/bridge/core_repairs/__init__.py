# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Repairs of Megatron-Core's optimizers, with CPU offload and without: one file a repair.

`install.py` puts them in place when the optimizer is set up.
"""
