# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Which fused kernels this process can run, and why not the others."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

from megatron.bridge.utils.device import is_simulated

# Core compiles these with torch.compile at their first call.
COMPILED_FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion")

# These come precompiled: fusion -> the package that brings its kernel.
KERNEL_FUSIONS = {
    "apply_rope_fusion": "transformer_engine",
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    "masked_softmax_fusion": "scaled_masked_softmax_cuda",
    "moe_permute_fusion": "transformer_engine",
    "moe_router_fusion": "transformer_engine",
    "tp_comm_overlap": "transformer_engine",
}


def why_unavailable(fusion: str) -> str | None:
    """The reason this process can't run a fusion, or None if it can.

    Args:
        fusion: A name in `COMPILED_FUSIONS` or `KERNEL_FUSIONS`.
    """
    if is_simulated():
        return "the accelerator is simulated"
    if fusion in KERNEL_FUSIONS:
        package = KERNEL_FUSIONS[fusion]
        return None if importlib.util.find_spec(package) else f"{package} is not installed"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "there is no C compiler"
    # triton compiles a launcher against them.
    return None if Path(sysconfig.get_paths()["include"], "Python.h").is_file() else "Python's C headers are missing"
