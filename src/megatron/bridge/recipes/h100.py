# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Recipes by the names that tell a machine, such as `llama32_1b_sft_1gpu_h100_bf16_config`.

That is `llama32_1b_sft_config`, whose layout one GPU can hold.

Public as `megatron.bridge.recipes.llama.h100` and `megatron.bridge.recipes.qwen.h100`.
"""

import functools
import re
from typing import TYPE_CHECKING, Any

from megatron.bridge.recipes import all_recipes

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

_NAME = re.compile(
    r"(?P<model>\w+)_(?P<mode>pretrain|sft|peft)_(?P<gpus>\d+)gpu_h100_(?P<precision>[a-z0-9]+)"
    r"(?P<deterministic>_deterministic)?_config"
)


def build(name: str, **options: Any) -> "ConfigContainer":
    """The configuration of a name; `options` are its recipe's.

    Raises:
        NotImplementedError: Another precision than bf16.
        ValueError: So many GPUs don't share the model as the recipe has it.
    """
    from megatron.bridge.recipes.build import smallest_world_size

    match = _NAME.fullmatch(name)
    assert match is not None, "__getattr__ refuses other names"
    short = f"{match['model']}_{match['mode']}_config"
    if match["precision"] != "bf16":
        raise NotImplementedError(
            f"{name}: recipes compute in bf16; take {short} and set mixed_precision on a machine that has the kernels"
        )
    cfg = all_recipes()[short](**options)
    num_gpus, needed = int(match["gpus"]), smallest_world_size(cfg)
    if num_gpus % needed:
        raise ValueError(
            f"{name} is for {num_gpus} GPUs, and {short} shares the model among {needed}: take {short}, and set its "
            "parallel sizes for your machine"
        )
    if match["deterministic"]:
        from megatron.bridge.recipes.utils.determinism_utils import apply_determinism_overrides

        apply_determinism_overrides(cfg)
    return cfg


def __getattr__(name: str) -> Any:
    match = _NAME.fullmatch(name)
    if match is None or f"{match['model']}_{match['mode']}_config" not in all_recipes():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(build, name)
