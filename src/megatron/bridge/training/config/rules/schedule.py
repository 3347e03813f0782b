# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Rules on learning rate and weight decay over time."""

from megatron.bridge.training.config.derived import derive
from megatron.bridge.training.config.sections import RunSections


def check_schedule_counts_as_the_run_does(cfg: RunSections, world_size: int) -> None:
    """A run counted in steps has a schedule in steps, a run counted in samples one in samples."""
    scheduler = cfg.scheduler
    in_steps = cfg.train.train_samples is None
    foreign = "samples" if in_steps else "iters"
    for name in (f"lr_decay_{foreign}", f"lr_warmup_{foreign}", f"lr_wsd_decay_{foreign}"):
        if getattr(scheduler, name):
            length, other = ("train_iters", "iters") if in_steps else ("train_samples", "samples")
            length = "num_epochs" if cfg.train.num_epochs is not None else length
            raise ValueError(
                f"scheduler.{name}={getattr(scheduler, name)} in a run whose length is train.{length}: "
                f"set scheduler.{name.replace(foreign, other)} instead"
            )


def check_schedule_fits_the_run(cfg: RunSections, world_size: int) -> None:
    """The schedule has a length, the warm-up is shorter than it, and a WSD schedule says when it falls.

    With `train.num_epochs`, `setup` asks again when it has read the data.
    """
    derived, unit = derive(cfg, world_size), "iters" if cfg.train.train_samples is None else "samples"
    if derived.skip_train or cfg.train.num_epochs is not None:
        return
    if derived.lr_decay_steps < 1:
        raise ValueError(f"train.train_iters={derived.train_iters}: a run takes at least one step; set 1 or more")
    if derived.lr_warmup_steps >= derived.lr_decay_steps:
        per_unit = derived.global_batch_size if unit == "iters" else 1
        raise ValueError(
            f"scheduler.lr_warmup_{unit}={derived.lr_warmup_steps // per_unit} but the learning rate decays over "
            f"{derived.lr_decay_steps // per_unit} {unit} (scheduler.lr_decay_{unit}, or the run's length): "
            "the warm-up must be shorter; lower it"
        )
    if cfg.scheduler.lr_decay_style == "WSD" and derived.wsd_decay_steps is None:
        raise ValueError(
            f"scheduler.lr_decay_style=WSD without scheduler.lr_wsd_decay_{unit}: set how long the last, "
            f"falling part is"
        )
    if derived.wsd_decay_steps is not None and derived.wsd_decay_steps > derived.lr_decay_steps:
        raise ValueError(
            f"scheduler.lr_wsd_decay_{unit} is longer than scheduler.lr_decay_{unit} (or the run): lower it"
        )


def check_learning_rates_are_ordered(cfg: RunSections, world_size: int) -> None:
    """A learning rate is set; the smallest and the first one are not above it."""
    lr = cfg.optimizer.lr
    if lr is None:
        raise ValueError("optimizer.lr is not set: it is the largest learning rate; set it, e.g. optimizer.lr=1e-5")
    if lr < 0:
        raise ValueError(f"optimizer.lr is {lr}: it can't be negative; set 0 or more")
    others = {"optimizer.min_lr": cfg.optimizer.min_lr, "scheduler.lr_warmup_init": cfg.scheduler.lr_warmup_init}
    for option, value in others.items():
        if value is not None and not 0.0 <= value <= lr:
            raise ValueError(f"{option}={value} with optimizer.lr={lr}: expected 0 to optimizer.lr; change one of them")


def check_weight_decay_grows(cfg: RunSections, world_size: int) -> None:
    """Weight decay stays or grows; it stays in the style named constant."""
    derived = derive(cfg, world_size)
    start, end, style = derived.start_weight_decay, derived.end_weight_decay, cfg.scheduler.weight_decay_incr_style
    if not 0.0 <= start <= end or (style == "constant" and start != end):
        expected = "equal values with weight_decay_incr_style=constant" if style == "constant" else "0 <= start <= end"
        raise ValueError(
            f"scheduler.start_weight_decay={start} and scheduler.end_weight_decay={end} (unset: "
            f"optimizer.weight_decay): "
            f"expected {expected}; change them"
        )
