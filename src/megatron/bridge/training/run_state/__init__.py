# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What of a run a checkpoint holds, and what a load restores: one file a part of it."""
