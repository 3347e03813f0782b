# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
import types

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from megatron.bridge.models.gemma3 import _scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_factor_is_rounded_as_in_transformers(dtype):
    """In bf16 the square root of 1152 is 34 instead of 33.94."""
    theirs = Gemma3TextScaledWordEmbedding(7, 1152, None, embed_scale=1152**0.5).to(dtype)
    rows = torch.nn.functional.embedding(torch.arange(7), theirs.weight)
    ours = _scaled(types.SimpleNamespace(word_embeddings=theirs), (), rows, factor=1152**0.5)
    assert ours.dtype is dtype and torch.equal(ours, theirs(torch.arange(7)))
