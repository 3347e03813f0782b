# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The public name CommOverlapConfig. Overlap of communication and compute through it is not built yet.

Data-parallel overlap is set where Core reads it: ddp.overlap_grad_reduce and ddp.overlap_param_gather.
"""

from dataclasses import dataclass
from typing import Any

from megatron.bridge.utils.section import Section


@dataclass(kw_only=True)
class CommOverlapConfig(Section):
    """What Megatron Bridge calls it. A configuration that holds one is refused, unless every field is off."""

    tp_comm_overlap: bool = False
    """Overlap tensor parallel communication with compute (Transformer Engine's user buffers)."""

    tp_comm_overlap_cfg: Any | None = None
    """Sizes of those buffers. None: Transformer Engine's own."""

    tp_comm_bootstrap_backend: str | None = None
    """Backend that sets those buffers up. None: NCCL."""

    overlap_p2p_comm: bool | None = None
    """Overlap pipeline communication. None: model.overlap_p2p_comm stays."""

    batch_p2p_comm: bool | None = None
    """Send and receive in one batch. None: model.batch_p2p_comm stays."""

    overlap_grad_reduce: bool | None = None
    """None: ddp.overlap_grad_reduce stays."""

    overlap_param_gather: bool | None = None
    """None: ddp.overlap_param_gather stays."""

    overlap_param_gather_with_optimizer_step: bool | None = None
    """None: optimizer.overlap_param_gather_with_optimizer_step stays."""

    align_param_gather: bool | None = None
    """None: ddp.align_param_gather stays."""

    bucket_size: int | None = None
    """None: ddp.bucket_size stays."""

    defer_embedding_wgrad_compute: bool | None = None
    """None: model.defer_embedding_wgrad_compute stays."""

    wgrad_deferral_limit: int | None = None
    """None: model.wgrad_deferral_limit stays."""

    data_parallel_size: int | None = None
    """Not needed here: worked out from the parallel sizes."""
