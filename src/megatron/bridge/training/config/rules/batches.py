# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on batch sizes and sequence lengths."""

from megatron.bridge.training.config.derived import data_parallel_size, derive, global_batch_size
from megatron.bridge.training.config.sections import RunSections


def check_global_batch_is_divisible(cfg: RunSections, world_size: int) -> None:
    """Each data-parallel rank takes equally many micro-batches."""
    micro, copies = cfg.train.required_micro_batch_size(), data_parallel_size(cfg, world_size)
    batch = global_batch_size(cfg, world_size)
    if batch % (micro * copies):
        raise ValueError(
            f"train.global_batch_size={batch} is no multiple of train.micro_batch_size={micro} x data-parallel size "
            f"{copies} = {micro * copies}: change train.global_batch_size, train.micro_batch_size or the number "
            f"of ranks"
        )


def check_evaluation_batch_is_divisible(cfg: RunSections, world_size: int) -> None:
    """The same for an evaluation with its own batch sizes."""
    derived = derive(cfg, world_size)
    share = derived.eval_micro_batch_size * derived.data_parallel_size
    if derived.eval_global_batch_size % share:
        raise ValueError(
            f"validation.eval_global_batch_size={derived.eval_global_batch_size} is no multiple of "
            f"validation.eval_micro_batch_size={derived.eval_micro_batch_size} x data-parallel size "
            f"{derived.data_parallel_size} = {share}: change one of them"
        )


def check_sequence_lengths_agree(cfg: RunSections, world_size: int) -> None:
    """Model and data say the same longest sequence."""
    data_length = getattr(cfg.dataset, "seq_length", None)  # a DatasetProvider may leave it to the model
    if data_length is not None and data_length != cfg.model.seq_length:
        raise ValueError(
            f"dataset.seq_length={data_length} and model.seq_length={cfg.model.seq_length}: they must agree; "
            "set both to the longest sample in tokens"
        )
