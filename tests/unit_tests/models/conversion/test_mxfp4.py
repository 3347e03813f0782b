# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron.bridge.models.conversion.mxfp4 import dequantize
from megatron.bridge.utils.simulated_accelerator import suspended

pytestmark = pytest.mark.any_core


def test_every_byte_and_scale_gives_what_transformers_gives():
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(40, 1, 1)
    scales = torch.arange(40 * 16).reshape(40, 16).remainder(200).add(20).to(torch.uint8)
    with suspended():
        theirs = convert_moe_packed_tensors(blocks[None], scales[None])[0].t()
    ours = dequantize(blocks, scales)
    assert ours.dtype is torch.bfloat16 and ours.shape == (40, 16 * 32)
    assert torch.equal(ours.view(torch.int16), theirs.contiguous().view(torch.int16))
    assert ours.unique().numel() > 500
