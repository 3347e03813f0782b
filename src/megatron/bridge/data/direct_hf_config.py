# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Finetuning straight from a dataset of the hub: nothing is written beside it."""

from dataclasses import dataclass
from typing import ClassVar

from megatron.bridge.data.config import GPTSFTDatasetConfig


@dataclass
class DirectHFSFTDatasetConfig(GPTSFTDatasetConfig):
    """As `GPTSFTDatasetConfig` with `hf_dataset`, tokenised in memory each time that a run starts."""

    keeps_tokens: ClassVar[bool] = False

    def finalize(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: There is no `hf_dataset`, or a field asks for files.
        """
        if self.hf_dataset is None:
            raise ValueError("dataset.hf_dataset is not set: expected a dataset's name, or HFDatasetSourceConfig")
        for name in ("dataset_root", "path_to_cache"):
            if getattr(self, name):
                raise ValueError(
                    f"dataset.{name}={getattr(self, name)!r}: DirectHFSFTDatasetConfig neither reads nor writes files "
                    "of its own; unset it, or use GPTSFTDatasetConfig"
                )
        super().finalize()
