# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The optimizer on the CPU: copies that follow the weights, and repairs of Core's hybrid and distributed optimizers.

One file a repair; `install.py` puts them in place when the optimizer is set up. Some serve the distributed optimizer
without offload too.
"""
