# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Continue prompts with a Hugging Face model or a Megatron checkpoint.

    python scripts/inference/generate_text.py --hf-model-path models/Llama-3.2-1B --prompts "The capital of France is"
    torchrun --nproc-per-node 2 scripts/inference/generate_text.py --megatron-model-path results/mine --tp 2 \
        --prompt-file prompts.jsonl --output-file answers.jsonl

Without --temperature, --top-k or --top-p always the likeliest token is taken, as by transformers' greedy generate.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

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
    groups_of,
    load_bridge_model,
    load_prompts,
    validate_sequence_length,
)
from megatron.bridge.utils.exit_codes import exit_code_of, exit_with
from megatron.bridge.utils.interpolation import expand_home


def build_parser() -> argparse.ArgumentParser:
    """The command line; options are taken with underscores too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_loading_args(parser)
    add_parallelism_args(parser)
    add_distributed_args(parser)
    add_engine_args(parser)
    add_prompt_args(parser)
    add_sampling_args(parser)
    parser.add_argument("--output-file", type=expand_home, help="write JSON lines here, and no text to the terminal")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load, generate, and write on rank 0."""
    from megatron.bridge.inference.engine import TextGenerationEngine
    from megatron.bridge.utils.distributed import is_rank_0, raise_on_all_ranks
    from megatron.bridge.utils.logging import setup_logging

    setup_logging()
    with groups_of(args):
        with raise_on_all_ranks("reading the command line"):
            config = build_inference_config(args)
            prompts = load_prompts(args)
            tokenizer = build_tokenizer(args)
            params = build_sampling_params(args)
            rows = encode_prompts(prompts, tokenizer, chat=args.chat, system=args.system, add_bos=args.add_bos)
            validate_sequence_length(args, rows)
        model = load_bridge_model(args)
        results = TextGenerationEngine(model=model, tokenizer=tokenizer, inference_config=config).generate(rows, params)
        if is_rank_0():
            write(prompts, results, args.output_file)


def write(prompts: Sequence[str], results: Sequence, output_file: str | None) -> None:
    """Write prompts and texts, to the terminal or as JSON lines."""
    if output_file is None:
        for prompt, result in zip(prompts, results, strict=True):
            print(f"prompt: {prompt}\ntext:   {result.generated_text}\n")
        return
    rows = [
        {
            "prompt": prompt,
            "generated_text": result.generated_text,
            "generated_tokens": result.generated_tokens.tolist(),
        }
        for prompt, result in zip(prompts, results, strict=True)
    ]
    path = Path(output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is reported in one line.
    """
    args = build_parser().parse_args(argv)
    return exit_code_of("generate_text", lambda: run(args))


if __name__ == "__main__":
    exit_with(main)
