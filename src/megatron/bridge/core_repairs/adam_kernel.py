# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The same Adam kernel with and without offload.

Without Transformer Engine or Apex, Core uses torch's fused kernel for an offloaded run, and torch's loop over tensors
for any other run. The two round differently. How often depends on the CPU: with AVX2 in a few elements of every
hundred, with AVX-512 in almost none. In addition, the choice of kernel is one of the options that a load restores from
the checkpoint, so a resume would use the kernel of the run that saved. Here it is always the fused kernel, which is
also the faster one.
"""

import re
from typing import Any

import megatron.core.optimizer as core_optimizer
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.bridge.core_repairs.repair import (
    Repair,
    source_of,
    stepping_optimizers,
    steps_by_torch_adam_or_hybrid,
)


def _fused_adam_kernel(base: type) -> type:
    """Overrides of `DistributedOptimizer`."""

    class FusedAdamKernel(base):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self._choose_the_fused_kernel()

        def step_with_ready_grads(self) -> bool:
            if not all(group.get("fused") for group in self.optimizer.param_groups):
                self._choose_the_fused_kernel()
            return super().step_with_ready_grads()

        def _choose_the_fused_kernel(self) -> None:
            for group in self.optimizer.param_groups:
                group["fused"] = True
                if group.get("foreach"):  # don't add the key: a hybrid's groups, and what is saved of them, lack it
                    group["foreach"] = None
            for optimizer in stepping_optimizers(self.optimizer):
                if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
                    for param, state in optimizer.state.items():
                        # The loop over tensors keeps the step counter on the host; the fused kernel needs it on the
                        # parameter's device.
                        if "step" in state and state["step"].device != param.device:
                            state["step"] = state["step"].to(param.device)

    return FusedAdamKernel


def _offload_alone_is_fused(distributed_optimizer: DistributedOptimizer) -> bool:
    source = source_of(core_optimizer._get_megatron_optimizer_based_on_param_groups)
    return steps_by_torch_adam_or_hybrid(distributed_optimizer) and len(re.findall(r"\bfused\b", source)) < 2


REPAIRS = (
    Repair(
        name="adam kernel",
        defect="runs with offload and without step with kernels of Adam that round differently",
        threads=(),
        core_versions="0.16.1 to 0.19.2",
        target=DistributedOptimizer,
        subclass=_fused_adam_kernel,
        is_needed=_offload_alone_is_fused,
    ),
)
