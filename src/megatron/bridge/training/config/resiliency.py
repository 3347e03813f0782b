# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The public names of the sections on NVIDIA's resiliency extension, which isn't built in.

Each holds Megatron Bridge's options, and is accepted while it switches nothing on. docs/training/running.md says what
there is instead: a rank that hangs ends itself, and a new start resumes from the newest complete checkpoint.
"""

from dataclasses import dataclass

from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class FaultToleranceConfig(BridgeSection):
    """Heartbeats for the extension, and faults to try it with; a configuration that asks for one is refused."""

    _section = "ft"


@dataclass(kw_only=True)
class NVRxStragglerDetectionConfig(BridgeSection):
    """Slow devices, found by the times of their kernels. A configuration that enables it is refused."""

    _section = "nvrx_straggler"


@dataclass(kw_only=True)
class InProcessRestartConfig(BridgeSection):
    """Restarts without new processes. A configuration that enables them is refused."""

    _section = "inprocess_restart"
