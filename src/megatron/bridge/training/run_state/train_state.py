# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Progress of a run, as each checkpoint holds it."""

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass
class TrainState:
    """Progress of a run: plain numbers, saved with every checkpoint as `train_state.pt`."""

    step: int = 0
    """Optimizer steps taken."""

    consumed_train_samples: int = 0
    """Training samples taken from the data, skipped steps included."""

    skipped_train_samples: int = 0
    """Samples of steps that were skipped."""

    consumed_valid_samples: int = 0
    """Validation samples evaluated."""

    floating_point_operations_so_far: float = 0.0
    """Floating point operations of all steps, by formula; assumes that each data-parallel rank does the same work."""

    do_train: bool = False
    """Whether the run has training data."""

    do_valid: bool = False
    """Whether the run has validation data."""

    do_test: bool = False
    """Whether the run has test data."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The fields as tensors: int64 counts, bool flags, float64 operations (a resume must give the same sum)."""
        dtypes = {"floating_point_operations_so_far": torch.float64, "do_train": torch.bool}
        dtypes |= {"do_valid": torch.bool, "do_test": torch.bool}
        return {
            item.name: torch.tensor(getattr(self, item.name), dtype=dtypes.get(item.name, torch.int64), device="cpu")
            for item in fields(self)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the fields from tensors or numbers.

        Raises:
            ValueError: A field is missing, or no number.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"the checkpoint's train state is a {type(state_dict).__name__}: expected named numbers")
        for item in fields(self):
            if item.name not in state_dict:
                found = ", ".join(str(name)[:40] for name in state_dict)
                raise ValueError(f"the checkpoint's train state lacks {item.name!r}: found {found[:400] or 'nothing'}")
            number: Any = type(item.default)
            try:
                setattr(self, item.name, number(state_dict[item.name]))
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                kind = type(state_dict[item.name]).__name__
                raise ValueError(
                    f"the checkpoint's train state has a {kind} as {item.name!r}: expected one number"
                ) from error
