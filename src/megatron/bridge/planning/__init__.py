# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Plan a run without running it: its memory, and each rank's shards of the weights."""
