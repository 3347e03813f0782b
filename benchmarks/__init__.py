# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What the claims in the documents rest on: benchmarks that anyone can run again."""
