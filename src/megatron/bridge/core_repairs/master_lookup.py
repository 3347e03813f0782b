# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Find the masters of a resumed run in default mode.

Core looks up every parameter in `param_to_fp32_param`. In default mode that dict is empty, so Core fails with KeyError
while it builds the load template (NovaSky-AI/SkyRL PR 1401, Megatron-LM PR 6124).
"""

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron.bridge.core_repairs.repair import Repair, source_of


def _master_lookup(base: type) -> type:
    """Overrides of `HybridDeviceOptimizer`."""

    class MasterLookup(base):
        def _update_fp32_params_by_new_state(self) -> None:
            if not self.param_update_in_fp32:
                return
            for param, state in self.state.items():
                master = self.param_to_inner_param[param]
                # An FP32 shard that stays on the device is its own master, and was loaded in place.
                if master is not param and master is not state["master_param"]:
                    master.data.copy_(state["master_param"])
                state["master_param"] = master

    return MasterLookup


def _looks_up_every_parameter(optimizer: HybridDeviceOptimizer) -> bool:
    return "self.param_to_fp32_param[param]" in source_of(HybridDeviceOptimizer._update_fp32_params_by_new_state)


REPAIRS = (
    Repair(
        name="master lookup",
        defect="a resume in default mode fails with KeyError",
        threads=("NovaSky-AI/SkyRL PR 1401", "NVIDIA/Megatron-LM PR 6124"),
        core_versions="0.16.1 to 0.19.2",
        target=HybridDeviceOptimizer,
        subclass=_master_lookup,
        is_needed=_looks_up_every_parameter,
    ),
)
