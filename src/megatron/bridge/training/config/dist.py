# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on the device and the process groups."""

from dataclasses import dataclass
from typing import Literal

from megatron.bridge.training.config.fields import require_positive
from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class DistributedInitConfig(BridgeSection):
    """Device and process groups."""

    _section = "dist"

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model lives. auto: cuda where there is one, else cpu, where an accelerator is simulated."""

    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How ranks talk to each other. auto: nccl on cuda, gloo on cpu."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a rank that waits for another, or takes no part of a step, shows its stacks and ends."""

    distributed_timeout_seconds_after_init: int | None = None
    """Seconds for the same from the second step on. None: the timeout above stays."""

    use_gloo_process_groups: bool = True
    """Make a gloo group beside each data-parallel group (for collectives on host memory)."""

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        require_positive(
            "dist",
            distributed_timeout_minutes=self.distributed_timeout_minutes,
            distributed_timeout_seconds_after_init=self.distributed_timeout_seconds_after_init,
        )
        if self.device == "cpu" and self.distributed_backend == "nccl":
            raise ValueError(
                "dist.distributed_backend=nccl with dist.device=cpu: NCCL only talks between GPUs; "
                "set dist.distributed_backend=gloo (or auto)"
            )
