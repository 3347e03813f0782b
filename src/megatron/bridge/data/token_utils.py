# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Tokens that stand for something other than text."""

import re
from typing import Any

import torch

__all__ = ["extract_skipped_token_ids"]

_PLACEHOLDER = re.compile(r"image|vision|video|audio|img_|fake_token_around|boi|eoi|patch", re.IGNORECASE)
_PADDING = re.compile(r"^[<\[|]+(finetune_right_)?pad(_id)?[|>\]]+$", re.IGNORECASE)


def extract_skipped_token_ids(processor: Any) -> torch.Tensor:
    """The special tokens that are never learned: padding, and placeholders of images, videos and sounds.

    A pad token that is also the EOS is learned: it ends an answer.

    Args:
        processor: A tokenizer, or a processor of transformers that has one as `tokenizer`.

    Returns:
        Their ids in order, int32 [N].
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer = getattr(tokenizer, "hf_tokenizer", tokenizer)
    added = {token: str(text) for token, text in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    skipped = {token for token, text in added.items() if _PLACEHOLDER.search(text) or _PADDING.match(text)}
    pad = getattr(tokenizer, "pad_token_id", None)
    skipped |= {pad} if pad is not None else set()
    return torch.tensor(sorted(skipped - {getattr(tokenizer, "eos_token_id", None)}), dtype=torch.int32)
