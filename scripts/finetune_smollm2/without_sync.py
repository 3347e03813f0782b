# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Show the defect: what Megatron-Core's offloaded optimizer does to a model that was loaded after it was built."""

from typing import Any

from megatron.bridge.training import checkpointing


def switch_off_sync() -> None:
    """Replace the sync and its guard by nothing, in this process only: for a picture, never to train."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    checkpointing.sync_hybrid_optimizer_param_copies = nothing
    checkpointing.check_hybrid_optimizer_param_copies = nothing
