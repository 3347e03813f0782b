# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Repair Megatron-Core's expert router, which fails without Transformer Engine.

`megatron/core/transformer/moe/moe_utils.py` (0.16.1) imports `te_general_gemm` in a `try` and doesn't define the name
if the import fails. The router then fails with NameError when it checks whether the name is None. Core 0.19.2 defines
it.
"""

import logging

from megatron.core.transformer.moe import moe_utils

logger = logging.getLogger(__name__)


def repair_router_gemm() -> None:
    """Define the missing name as None, so that Core's router uses torch's matrix product."""
    if "te_general_gemm" not in vars(moe_utils):
        moe_utils.te_general_gemm = None
        logger.info("repair of megatron-core's expert router in effect: te_general_gemm is None")
