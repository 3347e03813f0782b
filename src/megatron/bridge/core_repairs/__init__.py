# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Repairs of Megatron-Core's optimizers, with and without CPU offload: one file for each repair.

`install.py` puts them in place when the optimizer is set up.
"""
