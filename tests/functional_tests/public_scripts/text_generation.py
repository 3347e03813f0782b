# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Texts for many prompts: command line, model, tokenizer and engine, put together from the package's parts."""

import argparse
import json

from megatron.bridge.inference.engine import TextGenerationEngine
from megatron.bridge.inference.text_generation import (
    add_distributed_args,
    add_engine_args,
    add_model_loading_args,
    add_parallelism_args,
    add_prompt_args,
    add_sampling_args,
    build_inference_config,
    build_sampling_params,
    build_tokenizer,
    encode_prompts,
    load_bridge_model,
    load_prompts,
    validate_sequence_length,
)
from megatron.bridge.utils.common_utils import get_rank_safe


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with a finetuned model.")
    parser.add_argument("--output", required=True)
    for add_args in (
        add_model_loading_args,
        add_parallelism_args,
        add_distributed_args,
        add_engine_args,
        add_prompt_args,
        add_sampling_args,
    ):
        add_args(parser)
    args = parser.parse_args()
    tokenizer = build_tokenizer(args)
    prompts = load_prompts(args)
    rows = encode_prompts(prompts, tokenizer)
    validate_sequence_length(args, rows)
    engine = TextGenerationEngine(
        model=load_bridge_model(args), tokenizer=tokenizer, inference_config=build_inference_config(args)
    )
    results = engine.generate(rows, build_sampling_params(args))
    assert [result.prompt_tokens for result in results] == rows
    if get_rank_safe() == 0:
        with open(args.output, "w") as file:
            for prompt, result in zip(prompts, results, strict=True):
                file.write(json.dumps({"prompt": prompt, "text": result.generated_text}) + "\n")


if __name__ == "__main__":
    main()
