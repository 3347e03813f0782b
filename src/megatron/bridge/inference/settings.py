# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""From a command line to settings: of the engine, and of how tokens are chosen."""

import argparse
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.inference.options import OF_THE_DYNAMIC_ENGINE, NotGiven

if TYPE_CHECKING:
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron.bridge.inference.tokenizer import HFTokenizerAdapter

NO_END = -1
"""A `termination_id` that no token has."""


@dataclass(kw_only=True)
class InferenceLimits:
    """Stands in for Core's `InferenceConfig`, which Core 0.16 doesn't have: the fields that an engine here reads."""

    max_sequence_length: int = 2560
    """Most tokens of a prompt and its continuation."""

    max_requests: int | None = None
    """Most prompts that are continued together. None: all."""

    buffer_size_gb: float = 20
    """Most memory of a rank for the cache of keys and values, in GiB."""


def build_inference_config(args: argparse.Namespace, **overrides: Any) -> Any:
    """The engine's settings.

    Args:
        args: With the options of `add_engine_args`.
        overrides: Fields to set, in place of what the command line says.

    Returns:
        Core's `InferenceConfig`; with Core 0.16, which has none, `InferenceLimits`.

    Raises:
        ValueError: A limit below 1, or an option of Core's dynamic engine where that can't run.
    """
    from megatron.bridge.utils.device import choose_device  # here, so that `--help` doesn't import torch

    values = {name: getattr(args, name) for name in ("max_sequence_length", "max_requests", "buffer_size_gb")}
    options = {option[2:].replace("-", "_"): option for option in OF_THE_DYNAMIC_ENGINE}
    values |= {name: value for name in options if (value := getattr(args, name, None))} | overrides
    for name in ("max_sequence_length", "max_requests", "buffer_size_gb"):
        if values[name] is not None and values[name] <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {values[name]}: expected more than 0")
    core_has_one = importlib.util.find_spec("megatron.core.inference.config") is not None
    for name in values:
        if name in options and not (core_has_one and choose_device(getattr(args, "device", "auto")).type != "cpu"):
            where = "this computes on the CPU" if core_has_one else "this version of megatron-core has no such setting"
            raise ValueError(f"{options[name]} is of Core's dynamic engine on a GPU, and {where}: leave it out")
    if not core_has_one:
        return InferenceLimits(**values)
    from megatron.core.inference.config import InferenceConfig

    return InferenceConfig(**values)


def build_sampling_params(
    args: argparse.Namespace, tokenizer: "HFTokenizerAdapter | None" = None, **overrides: Any
) -> "SamplingParams":
    """How tokens are chosen, and how many, in Core's words.

    Without `--top-k` the likeliest token is taken, unless `--temperature` or `--top-p` asks for draws.

    Args:
        args: With the options of `add_sampling_args`.
        tokenizer: For engines of Core's, which take BOS away unless they are told to put it: whether it puts one.
        overrides: Fields to set, in place of what the command line says.

    Raises:
        ValueError: A number that can't be meant.
    """
    from megatron.core.inference.sampling_params import SamplingParams

    temperature, top_k, top_p = args.temperature, args.top_k, args.top_p
    if top_k is None:
        asks_for_draws = top_p or not (temperature == 0 or isinstance(temperature, NotGiven))
        top_k = 0 if asks_for_draws else 1
    if temperature == 0:
        if top_k > 1 or top_p:
            raise ValueError("--temperature 0 takes the likeliest token: leave --top-k and --top-p out")
        temperature, top_k = 1.0, 1
    if not 0 < temperature < float("inf"):
        raise ValueError(f"--temperature {temperature}: expected 0 (the likeliest token) or more")
    if top_k < 0:
        raise ValueError(f"--top-k {top_k}: expected 0 (all tokens) or more")
    if not 0 <= top_p <= 1:
        raise ValueError(f"--top-p {top_p}: expected 0 (all tokens) to 1")
    number = args.num_tokens_to_generate
    if number < 1:
        raise ValueError(f"--num-tokens-to-generate {number}: expected 1 or more")
    puts_bos = tokenizer is not None and tokenizer.puts_bos
    values: dict[str, Any] = {
        "temperature": float(temperature),
        "top_k": top_k,
        "top_p": float(top_p),
        "num_tokens_to_generate": number,
        "add_BOS": getattr(args, "add_bos", False) or puts_bos,
        "stop_words": getattr(args, "stop_words", None),
        "termination_id": NO_END if getattr(args, "ignore_eos", False) else None,
    }
    return SamplingParams(**{**values, **overrides})
