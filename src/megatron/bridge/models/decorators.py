# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A script's main function, as torchrun wants it."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from megatron.bridge.utils.distributed import destroy_model_parallel

__all__ = ["torchrun_main"]

P = ParamSpec("P")
T = TypeVar("T")


def torchrun_main(main: Callable[P, T]) -> Callable[P, T]:
    """Decorate the main function of a script: its error is the one that torchrun shows, and groups are taken down.

    A process group that was there before stays, and so does NCCL's after an error: its ranks would wait for each other.
    """
    recorded = record(main)

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        had_group = dist.is_initialized()
        failed = True
        try:
            result = recorded(*args, **kwargs)
            failed = False
        finally:
            if dist.is_initialized() and not had_group and not (failed and dist.get_backend() == "nccl"):
                destroy_model_parallel()
                dist.destroy_process_group()
        return result  # type: ignore[return-value]  # record says that there may be none

    return run
