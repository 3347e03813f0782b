# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the sync and the guard know of the copies that Core's HybridDeviceOptimizer keeps."""
