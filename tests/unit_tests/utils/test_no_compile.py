# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Core without torch's compiler: whole, usable, and quicker by what isn't imported."""

import subprocess
import sys

PROGRAM = """
import sys, torch
from megatron.bridge.utils.no_compile import import_core_without_compiling
compile = torch.compile
import_core_without_compiling()
import megatron.core.models.gpt
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert torch.compile is compile
assert swiglu(torch.ones(1, 4)).shape == (1, 2)
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_it_brings_no_compiler():
    shown = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=500)
    assert shown.stdout.split()[-1:] == ["False"], shown.stderr
