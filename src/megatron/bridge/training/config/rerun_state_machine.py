# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on steps whose result looks wrong."""

from dataclasses import dataclass

from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class RerunStateMachineConfig(BridgeSection):
    """What happens when a step gives a result that looks wrong."""

    _section = "rerun_state_machine"

    check_for_nan_in_loss: bool = True
    """Stop with an error, on all ranks, when a loss is NaN or infinite. Whatever this says, a gradient that is stops
    the run before the weights change (train.max_nonfinite_steps leaves such steps out)."""

    check_for_spiky_loss: bool = False
    """Treat a loss far above the recent ones as a wrong result."""
