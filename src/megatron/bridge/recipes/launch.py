# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A recipe by its name, as a function of plain values: what a `run.Partial` carries to the workers."""

from collections.abc import Sequence
from typing import Literal

from megatron.bridge.recipes.build import RecipeRequest


def run_recipe(
    recipe: str,
    mode: str | None = None,
    peft_scheme: Literal["lora", "dora"] | None = None,
    hf_path: str | None = None,
    seq_length: int | None = None,
    packed_sequence: bool = False,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train as a recipe says: what scripts/training/run_recipe.py does with the same options. Each rank calls it.

    Args:
        recipe: As in `RecipeRequest`, and so are the others.
        mode: "pretrain", "sft" or "peft".
        peft_scheme: Kind of adapters.
        hf_path: Directory of a Hugging Face model.
        seq_length: Longest sample in tokens.
        packed_sequence: Whether to pack samples.
        config_file: YAML with options.
        overrides: ["train.train_iters=50"].

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
    _, resolved = request.resolve()
    from megatron.bridge.training.gpt_step import forward_step

    if resolved == "pretrain":
        from megatron.bridge.training.pretrain import pretrain as train
    else:
        from megatron.bridge.training.finetune import finetune as train
    train(request.build(), forward_step)
