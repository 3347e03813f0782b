# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A repair of Megatron-Core's expert router, which asks for a matrix product of Transformer Engine's by a name that is
missing without it.

`megatron/core/transformer/moe/moe_utils.py` (0.16.1) imports `te_general_gemm` in a `try`, forgets the name where the
import fails, and dies with NameError where it asks whether it is None. Core 0.19.2 defines it.
"""

import logging

from megatron.core.transformer.moe import moe_utils

logger = logging.getLogger(__name__)


def repair_router_gemm() -> None:
    """Give Core's router the None that it asks for, where the name is missing. Its torch product is used then."""
    if "te_general_gemm" not in vars(moe_utils):
        moe_utils.te_general_gemm = None
        logger.info("repair of megatron-core's expert router in effect: te_general_gemm is None")
