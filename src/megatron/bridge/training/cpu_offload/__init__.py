# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The parameter copies of Core's HybridDeviceOptimizer: the sync that rebuilds them and the guard that checks them."""
