# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Whether code in a model's repository may be run."""

import os

__all__ = ["SAFE_REPOS", "is_safe_repo"]

SAFE_REPOS = frozenset(
    "HuggingFaceTB Qwen deepseek-ai google gpt2 meta-llama microsoft mistralai moonshotai nvidia openai".split()
)
"""Publishers on the Hugging Face hub whose code scripts run unless they are told not to."""


def is_safe_repo(hf_path: str | os.PathLike[str], trust_remote_code: bool | None = None) -> bool:
    """Whether a script may pass `trust_remote_code=True` to transformers for a model.

    This package itself never runs code of a model's directory, whatever it is passed.

    Args:
        hf_path: Directory, or hub name.
        trust_remote_code: What the user said, which counts; None: nothing.

    Returns:
        What the user said; else whether the publisher in the hub name is one of `SAFE_REPOS`.
    """
    if trust_remote_code is not None:
        return trust_remote_code
    path = os.fspath(hf_path)
    return not os.path.exists(path) and path.split("/")[0] in SAFE_REPOS
