# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The section on evaluation."""

from dataclasses import dataclass

from megatron.bridge.training.config.fields import require_not_negative, require_positive
from megatron.bridge.utils.section import BridgeSection


@dataclass(kw_only=True)
class ValidationConfig(BridgeSection):
    """When the model is evaluated, and on how much."""

    _section = "validation"

    eval_iters: int | None = 100
    """Global batches of one evaluation, of each set where there are several. None: the whole set. 0: no evaluation."""

    eval_interval: int | None = None
    """Steps between evaluations. None: only at the end of the run."""

    eval_at_start: bool = False
    """Evaluate before the first step too, so that a run shows what its training changed."""

    eval_global_batch_size: int | None = None
    """Samples of one evaluation step. None: train.global_batch_size."""

    eval_micro_batch_size: int | None = None
    """Samples of one forward pass in evaluation. None: train.micro_batch_size."""

    skip_train: bool = False
    """Evaluate and stop, without training."""

    full_validation: bool = False
    """Evaluate on the whole validation set each time."""

    multiple_validation_sets: bool = False
    """Evaluate each validation set by itself: those of `dataset.blend`, of `dataset.blend_per_split`, or of your own
    data. Metrics of a set have its name before theirs; without it they are of all sets together."""

    validation_set_names: list[str] | None = None
    """What the sets are called. None: as their files or directories."""

    def finalize(self) -> None:
        """Check the section's own fields.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        require_not_negative("validation", eval_iters=self.eval_iters)
        require_positive(
            "validation",
            eval_interval=self.eval_interval,
            eval_global_batch_size=self.eval_global_batch_size,
            eval_micro_batch_size=self.eval_micro_batch_size,
        )
        names = self.validation_set_names
        if names is None:
            return
        if not self.multiple_validation_sets:
            raise ValueError(
                f"validation.validation_set_names={names} without validation.multiple_validation_sets: set it to true, "
                "or leave the names out"
            )
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            raise ValueError(f"validation.validation_set_names={names}: expected texts that differ")
