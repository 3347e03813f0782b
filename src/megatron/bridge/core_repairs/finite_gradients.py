# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Don't step on gradients that are NaN or infinite.

Core checks for them only where the loss is scaled, which is in FP16. In bf16 and FP32 it computes the norm and clips
all gradients by it. A NaN norm then makes every weight NaN (epfLLM/Megatron-LLM PR 34, inclusionAI/AReaL #136).
"""

import math

from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of


class NonFiniteGradients(FloatingPointError):
    """The gradient's norm is NaN or infinite. Raised on all ranks, before any weight, master or moment has changed."""

    def __init__(self, norm: float) -> None:
        super().__init__(f"the gradient's norm is {norm}: the step was not taken")
        self.norm = norm


def _finite_gradient_norm(base: type) -> type:
    """Overrides of `ChainedOptimizer`. Its `step` computes the norm once all gradients are reduced, before any update.

    The norm is the same on every rank that steps, so all of them raise together.
    """

    class FiniteGradientNorm(base):
        def get_grad_norm(self) -> float:
            norm = super().get_grad_norm()
            if not math.isfinite(norm):
                raise NonFiniteGradients(float(norm))
            return norm

    return FiniteGradientNorm


def _steps_whatever_the_norm(optimizer: ChainedOptimizer) -> bool:
    source = source_of(ChainedOptimizer.step)
    return "isfinite(grad_norm)" not in source and "isnan(grad_norm)" not in source


REPAIRS = (
    Repair(
        name="finite gradients",
        defect="in bf16 and FP32 one NaN or infinite gradient makes all weights NaN",
        threads=("epfLLM/Megatron-LLM PR 34", "inclusionAI/AReaL #136"),
        core_versions="0.16.1 to 0.19.2",
        target=ChainedOptimizer,
        subclass=_finite_gradient_norm,
        is_needed=_steps_whatever_the_norm,
    ),
)
