# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Convert models between Hugging Face directories and Megatron checkpoints: `python -m megatron.bridge.convert`.

python scripts/conversion/convert.py import --hf-model DIR --megatron-path CKPT
python scripts/conversion/convert.py export --megatron-path CKPT --hf-path DIR
"""

from megatron.bridge.convert import main
from megatron.bridge.utils.exit_codes import exit_with

if __name__ == "__main__":
    exit_with(main)
