# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on the device and the process groups."""

import os
from dataclasses import dataclass, field
from typing import Literal

from megatron.bridge.training.config.fields import require_positive
from megatron.bridge.utils.section import Section


@dataclass(kw_only=True)
class DistributedInitConfig(Section):
    """Device and process groups."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model lives. auto: cuda where there is one, else cpu, where an accelerator is simulated."""

    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How ranks talk to each other. auto: nccl on cuda, gloo on cpu."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a rank that waits for another, or takes no part of a step, shows its stacks and ends."""

    distributed_timeout_seconds_after_init: int | None = None
    """Seconds for the same from the second step on. None: the timeout above stays."""

    local_rank: int = field(default_factory=lambda: int(os.getenv("LOCAL_RANK", "0")))
    """This process's number on its machine; torchrun sets it through LOCAL_RANK."""

    lazy_mpu_init: bool = False
    """Leave process groups to the caller. Not built yet. (Called lazy_init before.)"""

    lazy_init: bool = False
    """Deprecated name of lazy_mpu_init. Not built yet."""

    align_grad_reduce: bool = True
    """All pipeline stages reduce gradients at the same moment."""

    use_megatron_fsdp: bool = False
    """Shard with Megatron-FSDP. Not built yet."""

    use_torch_fsdp2: bool = False
    """Shard with torch's FSDP2. Not built yet."""

    nccl_communicator_config_path: str | None = None
    """YAML file with NCCL settings for each group. None: NCCL's own."""

    use_tp_pp_dp_mapping: bool = False
    """Number the ranks tensor, pipeline, data instead of tensor, data, pipeline."""

    use_gloo_process_groups: bool = True
    """Make a gloo group beside each data-parallel group (for collectives on host memory)."""

    use_decentralized_pg: bool = False
    """Pass process groups around instead of Core's global ones. Not built yet."""

    use_sharp: bool = False
    """Reduce inside the network switches (NCCL SHARP). Not built yet."""

    sharp_enabled_group: Literal["dp", "dp_replica"] | None = None
    """Group that uses SHARP. Not built yet. None: no group."""

    high_priority_stream_groups: list[str] | None = None
    """Groups whose communication gets a high-priority stream. None: no group."""

    disable_jit_fuser: bool = False
    """Run Core's fused elementwise functions without torch's compiler."""

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
