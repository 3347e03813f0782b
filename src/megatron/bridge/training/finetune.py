# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""`finetune`: a run that must start from existing weights."""

from collections.abc import Callable, Sequence

from megatron.bridge.training.callbacks import Callback, CallbackManager
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.pretrain import train_from_config


def finetune(
    config: ConfigContainer,
    forward_step_func: Callable,
    callbacks: Sequence[Callback] | CallbackManager | None = None,
) -> None:
    """Finetune a pretrained model, or resume a finetune.

    Weights come from `checkpoint.load` if it holds a checkpoint (a resume), else from
    `checkpoint.pretrained_checkpoint` (a Megatron checkpoint, one of its iterations, or a Hugging Face directory).
    With CPU offload the optimizer's masters follow what was loaded. Nothing needs to be called or set for that.

    Args:
        config: As for `pretrain`.
        forward_step_func: As for `pretrain`.
        callbacks: As for `pretrain`.

    Raises:
        FileNotFoundError: There is nothing to load.
        ValueError: As for `pretrain`.
    """
    train_from_config(config, forward_step_func, callbacks, load_required=True)
