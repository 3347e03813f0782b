# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The state of a run in a checkpoint, and what a load restores of it: one file for each part."""
