# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 2: checkpoints on disk. It knows files and tensors, and nothing of training."""
