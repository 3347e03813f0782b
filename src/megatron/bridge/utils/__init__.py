# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Floor 1: device, process groups, files, logging and YAML. It knows nothing of models or training."""
