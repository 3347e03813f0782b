# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Training: the configuration, the loop, checkpoints, monitoring, and the sync of the offloaded optimizer."""
