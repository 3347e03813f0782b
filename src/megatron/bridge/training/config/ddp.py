# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on data parallelism, which Megatron-Core owns."""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallelConfig as CoreDistributedDataParallelConfig

from megatron.bridge.utils.section import open_to_all_names
from megatron.bridge.utils.set_fields import RemembersSetFields, writes_that_nobody_set


@dataclass
class DistributedDataParallelConfig(RemembersSetFields, CoreDistributedDataParallelConfig):
    """Megatron-Core's data-parallel options, checked in `finalize()` instead of at birth."""

    def __post_init__(self) -> None:
        """Do nothing yet: overrides and mixed precision come first."""

    def finalize(self) -> None:
        """Run Core's checks.

        Raises:
            ValueError: naming the option that can't work.
        """
        open_to_all_names(self)
        try:
            with writes_that_nobody_set(self):
                super().__post_init__()
        except AssertionError as error:
            raise ValueError(f"ddp: {error}") from error
