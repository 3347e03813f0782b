# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Values that follow from a configuration and the number of ranks: pure functions that return a frozen object."""

import copy
import dataclasses
import math
from dataclasses import dataclass

from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig

from megatron.bridge.training.config.scheduler import SchedulerConfig
from megatron.bridge.training.config.sections import RunSections
from megatron.bridge.utils.parallel_sizes import dense_factors, in_words, parallel_sizes


@dataclass(frozen=True, kw_only=True)
class DerivedConfig:
    """What a run works out from its configuration. Nothing here can be set; change the fields it comes from."""

    world_size: int
    """Ranks of the run."""

    model_parallel_size: int
    """Ranks that hold one copy of the model: tensor times pipeline times context parallel size."""

    data_parallel_size: int
    """Copies of the model."""

    micro_batch_size: int
    """Samples of one forward pass."""

    global_batch_size: int
    """Samples of one optimizer step, over all ranks."""

    num_microbatches: int
    """Forward passes of one rank in one optimizer step."""

    train_iters: int
    """Optimizer steps of the whole run. With `train.num_epochs`, a step for each until the data is read."""

    eval_iters: int | None
    """Global batches of one evaluation. None: the whole validation set."""

    eval_interval: int | None
    """Steps between evaluations. None: only at the end."""

    eval_micro_batch_size: int
    """Samples of one forward pass in evaluation."""

    eval_global_batch_size: int
    """Samples of one evaluation step, over all ranks."""

    skip_train: bool
    """Evaluate only."""

    lr_decay_steps: int
    """Decay length in samples, the unit in which Core's scheduler counts."""

    lr_warmup_steps: int
    """Warm-up length in samples."""

    wd_incr_steps: int
    """Length of the weight decay's change in samples."""

    wsd_decay_steps: int | None
    """Length of WSD's falling part in samples. None: not WSD."""

    start_weight_decay: float
    """Weight decay at the first step."""

    end_weight_decay: float
    """Weight decay at the last step."""

    min_lr: float
    """Smallest learning rate."""

    train_samples: int
    """Samples that the run trains on; see `train_iters`."""

    valid_samples: int | None
    """Samples of all its evaluations together. None: whole passes over the validation set."""

    test_samples: int | None
    """Samples of one test at the end. None: the whole test set."""


def model_parallel_size(cfg: RunSections) -> int:
    """Ranks that hold one copy of the model."""
    return math.prod(dense_factors(parallel_sizes(cfg.model)).values())


def data_parallel_size(cfg: RunSections, world_size: int) -> int:
    """Copies of the model on this many ranks.

    Raises:
        ValueError: The parallel sizes don't divide the number of ranks.
    """
    ranks_per_copy = model_parallel_size(cfg)
    if world_size % ranks_per_copy:
        raise ValueError(
            f"{world_size} ranks can't be shared by model.{in_words(dense_factors(parallel_sizes(cfg.model)))}: "
            "the product must divide the number of ranks; change one of the sizes or start another number of ranks"
        )
    return world_size // ranks_per_copy


def global_batch_size(cfg: RunSections, world_size: int) -> int:
    """Samples of one optimizer step; unset means one micro-batch on each data-parallel rank."""
    if cfg.train.global_batch_size is not None:
        return cfg.train.global_batch_size
    return cfg.train.required_micro_batch_size() * data_parallel_size(cfg, world_size)


def train_iters(cfg: RunSections, world_size: int) -> int:
    """Optimizer steps of the run, from train_iters or from train_samples.

    What num_epochs says is known when the data is, from `with_known_length`; here an epoch counts as one step.
    """
    if cfg.train.train_iters is not None:
        return cfg.train.train_iters
    if cfg.train.num_epochs is not None:
        return cfg.train.num_epochs
    assert cfg.train.train_samples is not None  # finalize() wants one of them
    return cfg.train.train_samples // global_batch_size(cfg, world_size)


def with_known_length(cfg: RunSections, *, samples_per_epoch: int, world_size: int) -> RunSections:
    """A copy of a configuration with `train.num_epochs` that says its steps instead; others are returned as they are.

    Epochs follow without a gap, so a global batch may span two. Only what is left after the last one isn't trained on.
    """
    if cfg.train.num_epochs is None:
        return cfg
    samples = cfg.train.num_epochs * samples_per_epoch
    known = copy.copy(cfg)
    iters = samples // global_batch_size(cfg, world_size)
    known.train = dataclasses.replace(cfg.train, num_epochs=None, train_iters=iters)
    return known


def eval_settings(cfg: RunSections) -> tuple[int | None, int | None, bool]:
    """(eval_iters, eval_interval, skip_train), where the deprecated names on TrainingConfig win when they are set."""
    train, validation = cfg.train, cfg.validation
    eval_iters = validation.eval_iters if train.eval_iters is None else train.eval_iters
    return (
        None if validation.full_validation and eval_iters != 0 else eval_iters,
        validation.eval_interval if train.eval_interval is None else train.eval_interval,
        validation.skip_train if train.skip_train is None else train.skip_train,
    )


def weight_decay_ends(optimizer: CoreOptimizerConfig, scheduler: SchedulerConfig) -> tuple[float, float]:
    """Weight decay at the first and at the last step."""
    start, end = scheduler.start_weight_decay, scheduler.end_weight_decay
    return optimizer.weight_decay if start is None else start, optimizer.weight_decay if end is None else end


@dataclass(frozen=True, kw_only=True)
class _ScheduleSteps:
    """Lengths of the schedule in samples, the unit in which Core's scheduler counts."""

    decay: int
    warmup: int
    weight_decay: int
    wsd: int | None


def _schedule_steps(cfg: RunSections, batch: int, iters: int) -> _ScheduleSteps:
    """Translate the schedule's lengths, given in steps or in samples, into samples."""
    scheduler, train = cfg.scheduler, cfg.train
    if train.train_samples is not None:
        decay = scheduler.lr_decay_samples or train.train_samples
        warmup, total, wsd = scheduler.lr_warmup_samples, train.train_samples, scheduler.lr_wsd_decay_samples
    else:
        decay = (scheduler.lr_decay_iters or iters) * batch
        warmup, total = scheduler.lr_warmup_iters * batch, iters * batch
        wsd = None if scheduler.lr_wsd_decay_iters is None else scheduler.lr_wsd_decay_iters * batch
    if scheduler.lr_warmup_fraction is not None:
        warmup = int(scheduler.lr_warmup_fraction * decay)
    return _ScheduleSteps(decay=decay, warmup=warmup, weight_decay=total, wsd=wsd)


def derive(cfg: RunSections, world_size: int) -> DerivedConfig:
    """Work out what follows from a configuration.

    Args:
        cfg: The configuration; it is only read.
        world_size: Ranks of the run.

    Raises:
        ValueError: The parallel sizes don't divide the number of ranks.
    """
    micro_batch, copies = cfg.train.required_micro_batch_size(), data_parallel_size(cfg, world_size)
    batch, iters = global_batch_size(cfg, world_size), train_iters(cfg, world_size)
    steps = _schedule_steps(cfg, batch, iters)
    eval_iters, eval_interval, skip_train = eval_settings(cfg)
    eval_batch = cfg.validation.eval_global_batch_size or batch
    num_evaluations = 1 if eval_interval is None else iters // eval_interval + 1
    start_weight_decay, end_weight_decay = weight_decay_ends(cfg.optimizer, cfg.scheduler)
    return DerivedConfig(
        world_size=world_size,
        model_parallel_size=model_parallel_size(cfg),
        data_parallel_size=copies,
        micro_batch_size=micro_batch,
        global_batch_size=batch,
        num_microbatches=batch // (micro_batch * copies),
        train_iters=iters,
        eval_iters=eval_iters,
        eval_interval=eval_interval,
        eval_micro_batch_size=cfg.validation.eval_micro_batch_size or micro_batch,
        eval_global_batch_size=eval_batch,
        skip_train=skip_train,
        lr_decay_steps=steps.decay,
        lr_warmup_steps=steps.warmup,
        wd_incr_steps=steps.weight_decay,
        wsd_decay_steps=steps.wsd,
        start_weight_decay=start_weight_decay,
        end_weight_decay=end_weight_decay,
        min_lr=0.0 if cfg.optimizer.min_lr is None else cfg.optimizer.min_lr,
        train_samples=iters * batch if cfg.train.train_samples is None else cfg.train.train_samples,
        valid_samples=None if eval_iters is None else num_evaluations * eval_iters * eval_batch,
        test_samples=None if eval_iters is None else eval_iters * eval_batch,
    )
