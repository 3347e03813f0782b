# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The parts that scripts for generating text are put together from, as `scripts/inference/generate_text.py` is."""

from megatron.bridge.inference.loading import groups_of, load_bridge_model, resolve_hf_model_path
from megatron.bridge.inference.options import (
    add_distributed_args,
    add_engine_args,
    add_model_loading_args,
    add_parallelism_args,
    add_prompt_args,
    add_sampling_args,
)
from megatron.bridge.inference.prompts import encode_prompts, load_prompts, validate_sequence_length
from megatron.bridge.inference.settings import build_inference_config, build_sampling_params
from megatron.bridge.inference.tokenizer import HFTokenizerAdapter, build_tokenizer

__all__ = [
    "HFTokenizerAdapter",
    "add_distributed_args",
    "add_engine_args",
    "add_model_loading_args",
    "add_parallelism_args",
    "add_prompt_args",
    "add_sampling_args",
    "build_inference_config",
    "build_sampling_params",
    "build_tokenizer",
    "encode_prompts",
    "groups_of",
    "load_bridge_model",
    "load_prompts",
    "resolve_hf_model_path",
    "validate_sequence_length",
]
