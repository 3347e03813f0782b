# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on random numbers."""

from dataclasses import dataclass

from megatron.bridge.training.config.fields import require_not_negative
from megatron.bridge.utils.section import Section


@dataclass(kw_only=True)
class RNGConfig(Section):
    """Random numbers."""

    seed: int = 1234
    """Seed of Python, NumPy, torch and Megatron-Core's tracker."""

    te_rng_tracker: bool = False
    """Use Transformer Engine's tracker of random states (needed by CUDA graphs)."""

    inference_rng_tracker: bool = False
    """Use a tracker that only serves inference."""

    data_parallel_random_init: bool = False
    """Give each data-parallel rank its own random numbers when weights are initialised."""

    def finalize(self) -> None:
        """Check the section's own fields."""
        require_not_negative("rng", seed=self.seed)
