# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 2: what a checkpoint is on disk; knows files and tensors, nothing of training."""
