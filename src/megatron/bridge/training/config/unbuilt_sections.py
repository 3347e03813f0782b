# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Sections that only Megatron Bridge has: making one is an error that says what to do instead."""

from typing import Any, ClassVar

from megatron.bridge.utils.unbuilt_options import UNSUPPORTED


class _NotBuilt:
    """Refuses to be made."""

    section: ClassVar[str]

    def __init__(self, **fields: Any) -> None:
        instead = next(row.instead for row in UNSUPPORTED if row.option == self.section)
        raise ValueError(f"{self.section}: {type(self).__name__} is not built here: {instead or 'leave it out'}")


class FaultToleranceConfig(_NotBuilt):
    """Refused: NVIDIA's fault tolerance isn't used."""

    section = "ft"


class StragglerDetectionConfig(_NotBuilt):
    """Refused: slow ranks aren't looked for."""

    section = "straggler"


class NVRxStragglerDetectionConfig(_NotBuilt):
    """Refused: slow ranks aren't looked for."""

    section = "nvrx_straggler"


class TensorInspectConfig(_NotBuilt):
    """Refused: tensors of a step aren't recorded."""

    section = "tensor_inspect"


class InProcessRestartConfig(_NotBuilt):
    """Refused: a run that fails ends."""

    section = "inprocess_restart"
