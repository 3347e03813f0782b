# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Continue a text with a Megatron checkpoint, to see what was trained.

    python -m megatron.bridge.generate --megatron-path CKPT --prompt "The capital of France is"
    python -m megatron.bridge.generate --megatron-path CKPT --prompt "What is the capital of France?" --chat

The text is printed while it is generated. Models larger than one process's memory run under torchrun, split by --tp,
--pp and --ep. A checkpoint of adapters is loaded together with the model that they were trained on.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.bridge.utils.command_options import DTYPES, add_checkpoint_options
from megatron.bridge.utils.exit_codes import exit_with
from megatron.bridge.utils.parallel_sizes import PARALLEL_SIZES

if TYPE_CHECKING:
    from megatron.bridge.data.tokenizer import HuggingFaceTokenizer

logger = logging.getLogger(__name__)

_SIZES = {short.lower(): PARALLEL_SIZES[short] for short in ("TP", "PP", "EP")}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron.bridge.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_options(parser, with_base=True)
    parser.add_argument("--prompt", required=True, help="what to continue; with --chat, the user's message")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument("--add-bos", action="store_true", help="begin with BOS though the tokenizer doesn't put it")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="stop after this many (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among this many of the likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest with this probability")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in (default: the checkpoint's)")
    for option, size in _SIZES.items():
        parser.add_argument(f"--{option}", type=int, default=1, help=size.meaning)
    return parser


def read_tokenizer_files(args: argparse.Namespace) -> "tuple[HuggingFaceTokenizer, dict[str, Any]]":
    """The tokenizer that was saved with the checkpoint, or else that of `--hf-model`, and `generation_config.json`.

    Raises:
        FileNotFoundError: There is no tokenizer.
    """
    from megatron.bridge.checkpoint.iterations import TOKENIZER_DIRECTORY, resolve_checkpoint
    from megatron.bridge.data.config import TokenizerConfig
    from megatron.bridge.data.tokenizer import HuggingFaceTokenizer, build_tokenizer
    from megatron.bridge.models.conversion.tokenizer_files import TokenizerFiles, has_tokenizer
    from megatron.bridge.utils.hf_hub import find_hf_directory

    own = resolve_checkpoint(args.megatron_path) / TOKENIZER_DIRECTORY
    if args.hf_model is None and not has_tokenizer(own):
        raise FileNotFoundError(f"{own} holds no tokenizer: pass --hf-model with the model's directory")
    model = None if args.hf_model is None else find_hf_directory(args.hf_model, with_weights=False)
    text = TokenizerFiles.of_checkpoint(args.megatron_path, model)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(text.tokenizer)))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer, text.generation or {}


def warn_of_settings(generation: "dict[str, Any]") -> None:
    """Warn of settings that transformers' greedy `generate` applies and this command doesn't."""
    from megatron.bridge.models.conversion.generation_config import not_applied

    settings = ", ".join(f"{name}={value!r}" for name, value in not_applied(generation).items())
    if settings:
        logger.warning(
            "generation_config.json says %s, which transformers' generate applies and this command doesn't: the text "
            "may be another",
            settings,
        )


def encode_prompt(args: argparse.Namespace, tokenizer: "HuggingFaceTokenizer") -> list[int]:
    """The prompt's tokens.

    Raises:
        ValueError: The options contradict each other, or the tokenizer lacks what they ask for.
    """
    if not args.chat:
        if args.system is not None:
            raise ValueError("--system is part of a conversation: add --chat")
        ids = tokenizer.prompt_to_ids(args.prompt)
        if not args.add_bos:
            return ids
        if tokenizer.bos_id is None:
            raise ValueError(f"--add-bos: tokenizer {tokenizer.name} has no BOS token")
        return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    if args.add_bos:
        raise ValueError("--add-bos with --chat: the chat template begins the text; leave it out")
    messages = [{"role": "user", "content": args.prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return tokenizer.text_to_ids(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def as_text(tokens: Iterator[int], tokenizer: "HuggingFaceTokenizer", *, before: Sequence[int]) -> Iterator[str]:
    """Yield the text of tokens as soon as it is known. A character may take several tokens.

    Args:
        tokens: What was generated; all of them are taken.
        tokenizer: Makes the text.
        before: Tokens that the text follows; a tokenizer may join its first word to them.
    """
    ids = list(before)
    shown = len(tokenizer.ids_to_text(ids, skip_special_tokens=True))
    for token in tokens:
        ids.append(token)
        text = tokenizer.ids_to_text(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.ids_to_text(ids, skip_special_tokens=True)[shown:]


def run(args: argparse.Namespace) -> None:
    """Load, generate, and write to stdout on rank 0."""
    from megatron.bridge.models.conversion.generation_config import end_ids
    from megatron.bridge.models.generation import Sampling, generate_tokens, load_for_generation
    from megatron.bridge.utils.distributed import is_rank_0, model_parallel_groups, raise_on_all_ranks

    sizes = {size.field: getattr(args, option) for option, size in _SIZES.items()}
    with model_parallel_groups(**sizes):
        with raise_on_all_ranks("reading the command line"):
            if args.max_new_tokens < 1:
                raise ValueError(f"--max-new-tokens {args.max_new_tokens}: expected 1 or more")
            sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
            tokenizer, generation = read_tokenizer_files(args)
            prompt = encode_prompt(args, tokenizer)
            if is_rank_0():
                warn_of_settings(generation)
        model = load_for_generation(args.megatron_path, hf_model=args.hf_model, base=args.base, dtype=args.dtype)
        limits = {"max_new_tokens": args.max_new_tokens, "end_ids": end_ids(generation)}
        tokens = generate_tokens(model, prompt, sampling=sampling, **limits)
        for text in as_text(tokens, tokenizer, before=prompt):
            if is_rank_0():
                print(text, end="", flush=True)
        if is_rank_0():
            print()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is reported in one line.
    """
    args = build_parser().parse_args(argv)
    from megatron.bridge.utils.logging import setup_logging

    setup_logging()
    try:
        run(args)
    except (ValueError, FileNotFoundError, RuntimeError, FloatingPointError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    exit_with(main)
