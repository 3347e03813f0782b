# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Public import path of a Hugging Face model that is looked at before, or compared with after, a conversion."""

from typing import Any

__all__ = ["PreTrainedCausalLM"]


def __getattr__(name: str) -> Any:
    if name == "PreTrainedCausalLM":
        from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

        return PreTrainedCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
