# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The public name CommOverlapConfig. Overlap of communication and compute through it is not built yet.

Data-parallel overlap is set where Core reads it: ddp.overlap_grad_reduce and ddp.overlap_param_gather.
"""

from dataclasses import dataclass

from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class CommOverlapConfig(BridgeSection):
    """What Megatron Bridge calls it. A configuration that holds one is refused, unless every field is off."""

    _section = "comm_overlap"
