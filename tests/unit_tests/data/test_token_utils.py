# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import torch

from megatron.bridge.data.token_utils import extract_skipped_token_ids


def test_placeholders_and_padding_are_skipped_and_ends_are_not(tokenizer):
    texts = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<pad>", "<audio>", "<tool_call>"]
    added = dict(enumerate(texts, start=10))
    one = SimpleNamespace(added_tokens_decoder=added, pad_token_id=3, eos_token_id=11)
    for processor in (one, SimpleNamespace(tokenizer=one)):
        found = extract_skipped_token_ids(processor)
        assert found.tolist() == [3, 12, 13, 14, 15] and found.dtype == torch.int32
    assert extract_skipped_token_ids(tokenizer).tolist() == [], "its pad token is its EOS"
