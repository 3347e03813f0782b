# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What a run says to the data that is built for it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DatasetBuildContext:
    """What a dataset may need to know about the run."""

    train_samples: int | None
    """Training samples the run will draw. None: whole passes (`train.num_epochs`)."""

    valid_samples: int | None
    """Validation samples the run will draw. None: whole passes."""

    test_samples: int | None
    """Test samples the run will draw. None: whole passes."""

    tokenizer: Any = None
    """The run's tokenizer, as made by `build_tokenizer`."""

    multiple_validation_sets: bool = False
    """Whether validation is a dict of datasets by name (or a list), each evaluated by itself."""

    validation_set_names: tuple[str, ...] | None = None
    """What they are called. None: as the data says."""
