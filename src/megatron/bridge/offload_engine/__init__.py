# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The offloaded step in buckets: host memory, transfers, and Adam over contiguous memory."""
