# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of an optimizer and its schedule, made together."""

from megatron.bridge.training.config import OptimizerConfig, SchedulerConfig

__all__ = ["distributed_fused_adam_with_cosine_annealing"]


def distributed_fused_adam_with_cosine_annealing(
    *,
    lr_warmup_iters: int = 2000,
    lr_decay_iters: int | None = None,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.95,
    adam_eps: float = 1e-5,
    weight_decay: float = 0.1,
    max_lr: float = 1e-4,
    min_lr: float | None = None,
    clip_grad: float = 1.0,
) -> tuple[OptimizerConfig, SchedulerConfig]:
    """Adam in the distributed optimizer, with a learning rate that rises in a line and falls along a cosine.

    Number formats are `mixed_precision`'s.

    Args:
        lr_warmup_iters: Steps to `max_lr`.
        lr_decay_iters: Steps to `min_lr`; None: the run's.
        adam_beta1: Of the first moment.
        adam_beta2: Of the second moment.
        adam_eps: Added to the second moment's root.
        weight_decay: Constant over the run.
        max_lr: Largest learning rate.
        min_lr: Smallest one; None: a tenth of `max_lr`.
        clip_grad: Largest norm of the gradients.
    """
    optimizer = OptimizerConfig(
        optimizer="adam",
        lr=max_lr,
        min_lr=0.1 * max_lr if min_lr is None else min_lr,
        weight_decay=weight_decay,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        adam_eps=adam_eps,
        clip_grad=clip_grad,
        use_distributed_optimizer=True,
    )
    scheduler = SchedulerConfig(lr_decay_style="cosine", lr_warmup_iters=lr_warmup_iters, lr_decay_iters=lr_decay_iters)
    return optimizer, scheduler
