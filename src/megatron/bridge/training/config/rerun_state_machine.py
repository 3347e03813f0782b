# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on steps whose result looks wrong."""

from dataclasses import dataclass
from typing import Literal

from megatron.bridge.training.config.fields import require_not_negative
from megatron.bridge.utils.section import Section


@dataclass(kw_only=True)
class RerunStateMachineConfig(Section):
    """What happens when a step gives a result that looks wrong."""

    error_injection_rate: int = 0
    """Core's own tests inject an error once in so many steps. 0: never."""

    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = "transient_error"
    """The kind of error injected."""

    rerun_mode: Literal["disabled", "validate_results", "report_stats"] = "disabled"
    """disabled: no step is run twice. The other modes are not built yet."""

    check_for_nan_in_loss: bool = True
    """Stop with an error, on all ranks, when a loss is NaN or infinite. Whatever this says, a gradient that is stops
    the run before the weights change (train.max_nonfinite_steps leaves such steps out)."""

    check_for_spiky_loss: bool = False
    """Treat a loss far above the recent ones as a wrong result."""

    def finalize(self) -> None:
        """Check the section's own fields."""
        require_not_negative("rerun_state_machine", error_injection_rate=self.error_injection_rate)
