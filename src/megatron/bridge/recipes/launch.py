# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Run a recipe by name, as a function of plain values that a `run.Partial` can send to the workers."""

import importlib
from collections.abc import Callable, Sequence
from typing import Literal

from megatron.bridge.recipes.build import RecipeRequest


def run_recipe(
    recipe: str,
    mode: str | None = None,
    peft_scheme: Literal["lora", "dora", "canonical_lora"] | None = None,
    hf_path: str | None = None,
    seq_length: int | None = None,
    packed_sequence: bool = False,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
    step_func: str = "gpt_step",
) -> None:
    """Train as a recipe says: what scripts/training/run_recipe.py does with the same options. Each rank calls it.

    Args:
        recipe: As in `RecipeRequest`, and so are the others.
        mode: "pretrain", "sft" or "peft".
        peft_scheme: Kind of adapters.
        hf_path: Directory, or hub name, of a Hugging Face model.
        seq_length: Longest sample in tokens.
        packed_sequence: Whether to pack samples.
        config_file: YAML with options.
        overrides: ["train.train_iters=50"].
        step_func: As for `train_recipe`.

    Raises:
        ValueError, FileNotFoundError: Something asked for isn't there or can't work; as for `finetune`.
    """
    request = RecipeRequest(
        recipe=recipe,
        mode=mode,
        peft_scheme=peft_scheme,
        hf_path=hf_path,
        seq_length=seq_length,
        packed_sequence=packed_sequence,
        config_file=config_file,
        overrides=overrides,
    )
    train_recipe(request, step_func=step_func)


def train_recipe(request: RecipeRequest, *, step_func: str = "gpt_step") -> None:
    """Train as asked for. Each rank calls it.

    Args:
        request: The recipe, its options and overrides.
        step_func: "gpt_step", or "module:function" of your own.

    Raises:
        ValueError, FileNotFoundError: As for `run_recipe`.
    """
    _, mode = request.resolve()
    forward_step = _step_named(step_func)
    if mode == "pretrain":
        from megatron.bridge.training.pretrain import pretrain as train
    else:
        from megatron.bridge.training.finetune import finetune as train
    train(request.build(), forward_step)


def _step_named(name: str) -> Callable:
    module, colon, function = name.partition(":")
    if not colon:
        module, function = f"megatron.bridge.training.{name}", "forward_step"
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"step_func={name}: {error}; expected gpt_step, or module:function") from None
