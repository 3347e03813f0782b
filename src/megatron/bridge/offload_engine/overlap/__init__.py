# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The overlapped step: the host steps, and weights return, while the next forward pass runs."""
