# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Training: the configuration, the loop, what is loaded and saved, and the offloaded optimizer."""
