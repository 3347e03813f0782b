# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 3: adapters, small trainable layers beside the frozen ones of a pretrained model."""
